"""Changes of ONNX files, by structure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import onnx

from tests.robustness.files import Change

_OPERATORS = (
    "Identity",
    "Relu",
    "MatMul",
    "Nonesuch",
    "",
    "Loop",
    "If",
    "MoE",
    "QMoE",
    "GroupQueryAttention",
    "Cast",
    "Gather",
    "Constant",
)
_INTEGERS = (0, -1, 1, 2, 3, 7, 2**31, -(2**63), 2**63 - 1)


def _change_onnx(path: Path, random: Random, what: str) -> None:
    proto = onnx.load_model(path, load_external_data=False)
    _ONNX[what](proto, random)
    path.write_bytes(proto.SerializeToString())


def _drop_node(proto: onnx.ModelProto, random: Random) -> None:
    del proto.graph.node[random.randrange(len(proto.graph.node))]


def _repeat_node(proto: onnx.ModelProto, random: Random) -> None:
    proto.graph.node.append(random.choice(proto.graph.node))


def _change_operator(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.node).op_type = random.choice(_OPERATORS)


def _change_domain(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.node).domain = random.choice(("", "com.microsoft", "ai.onnx.ml", "x.y", "\x1b[31m"))


def _change_edge(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in proto.graph.node if node.input])
    others = [name for other in proto.graph.node for name in other.output] + [
        tensor.name for tensor in proto.graph.initializer
    ]
    node.input[random.randrange(len(node.input))] = random.choice((random.choice(others), "", "not-there"))


def _change_arity(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in proto.graph.node if node.input])
    if random.random() < 0.5:
        del node.input[random.randrange(len(node.input))]
    else:
        node.input.append(node.input[0])


def _rename_output(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice(proto.graph.node)
    node.output[random.randrange(len(node.output))] = random.choice(
        ("x", "", node.input[0] if node.input else "y", "logits")
    )


def _shuffle_nodes(proto: onnx.ModelProto, random: Random) -> None:
    nodes = list(proto.graph.node)
    random.shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _choose_attribute(proto: onnx.ModelProto, random: Random) -> tuple[onnx.NodeProto, int]:
    node = random.choice([node for node in proto.graph.node if node.attribute])
    return node, random.randrange(len(node.attribute))


def _drop_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    del node.attribute[number]


def _change_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    attribute = node.attribute[number]
    match attribute.type:
        case onnx.AttributeProto.INT:
            attribute.i = random.choice((*_INTEGERS, attribute.i + 1))
        case onnx.AttributeProto.FLOAT:
            attribute.f = random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        case onnx.AttributeProto.STRING:
            attribute.s = random.choice((b"", b"x", b"\xff", b"swiglu", b"relu"))
        case onnx.AttributeProto.INTS:
            attribute.ints[:] = random.choice((list(attribute.ints)[:-1], [*attribute.ints, 1], [-1], [2**40]))
        case _:
            attribute.type = onnx.AttributeProto.INT


def _retype_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    name = node.attribute[number].name
    node.attribute[number].CopyFrom(
        onnx.helper.make_attribute(name, random.choice((1, 1.0, "x", [1, 2], [1.0], ["x"])))
    )


def _rename_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    node.attribute[number].name = random.choice(("x", "", f"{node.attribute[number].name}_"))


def _cut_initializer(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(
        [tensor for tensor in proto.graph.initializer if tensor.raw_data] or list(proto.graph.initializer)
    )
    tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]


def _change_dims(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(proto.graph.initializer)
    dims = list(tensor.dims)
    tensor.dims[:] = random.choice(
        (dims[::-1], dims[:-1], [*dims, 1], [2 * size for size in dims], [0], [-1], [2**40, 2**40], [2**62])
    )


def _change_tensor_type(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.initializer).data_type = random.choice((0, 1, 2, 6, 7, 8, 10, 11, 16, 21, 22, 99))


def _drop_initializer(proto: onnx.ModelProto, random: Random) -> None:
    del proto.graph.initializer[random.randrange(len(proto.graph.initializer))]


def _rename_initializer(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(proto.graph.initializer)
    tensor.name = random.choice(("", "x", random.choice(proto.graph.initializer).name, "input_ids", "[red]\x1b[31m"))


def _change_external(proto: onnx.ModelProto, random: Random) -> None:
    """Where the bytes of a tensor lie."""
    outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    if not outside:
        return
    entry = random.choice(random.choice(outside).external_data)
    values = {
        "location": (
            "",
            "x",
            "../model.onnx_data",
            "/etc/passwd",
            "config.json",
            ".",
            "model.onnx",
            "a\x00b",
            "x" * 5000,
        ),
        "offset": ("-1", "1", "7", "x", "", "99999999", str(2**63), str(2**64), "1e3"),
        "length": ("-1", "0", "1", "x", "", "99999999", str(2**63)),
    }
    if random.random() < 0.2:
        entry.key = random.choice(("", "x", "offset", "length", "location", "checksum"))
    else:
        entry.value = random.choice(values.get(entry.key, ("x",)))


def _inline_external(proto: onnx.ModelProto, random: Random) -> None:
    outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    if outside:
        tensor = random.choice(outside)
        if random.random() < 0.5:
            tensor.data_location = onnx.TensorProto.DEFAULT
        else:
            del tensor.external_data[random.randrange(len(tensor.external_data))]


def _change_value(proto: onnx.ModelProto, random: Random) -> None:
    """An input or output of the graph."""
    values = random.choice((proto.graph.input, proto.graph.output))
    value = random.choice(values)
    kind = value.type.tensor_type
    match random.randrange(7):
        case 0:
            values.remove(value)
        case 1:
            value.name = random.choice(
                ("x", "", "logits", "input_ids", "past_key_values.9.key", "present.key", f"{value.name}\x1b")
            )
        case 2:
            kind.elem_type = random.choice((0, 1, 7, 8, 10, 99))
        case 3 if kind.shape.dim:
            kind.shape.dim[random.randrange(len(kind.shape.dim))].dim_value = random.choice(_INTEGERS)
        case 4 if kind.shape.dim:
            del kind.shape.dim[random.randrange(len(kind.shape.dim))]
        case 5:
            value.ClearField("type")
        case _:
            values.append(value)


def _change_opset(proto: onnx.ModelProto, random: Random) -> None:
    entry = random.choice(proto.opset_import)
    match random.randrange(3):
        case 0:
            proto.opset_import.remove(entry)
        case 1:
            entry.version = random.choice((0, -1, 1, 7, 99, 2**40))
        case _:
            entry.domain = random.choice(("", "x", "com.microsoft"))


def _change_version(proto: onnx.ModelProto, random: Random) -> None:
    proto.ir_version = random.choice((0, -1, 1, 3, 99, 2**40))


def _drop_graph(proto: onnx.ModelProto, random: Random) -> None:
    match random.randrange(4):
        case 0:
            proto.ClearField("graph")
        case 1:
            del proto.graph.node[:]
        case 2:
            del proto.graph.initializer[:]
        case _:
            del proto.graph.output[:]


_ONNX: dict[str, Callable[[onnx.ModelProto, Random], None]] = {
    "drop node": _drop_node,
    "repeat node": _repeat_node,
    "operator": _change_operator,
    "domain": _change_domain,
    "edge": _change_edge,
    "arity": _change_arity,
    "output name": _rename_output,
    "order of nodes": _shuffle_nodes,
    "drop attribute": _drop_attribute,
    "attribute": _change_attribute,
    "type of attribute": _retype_attribute,
    "name of attribute": _rename_attribute,
    "cut initializer": _cut_initializer,
    "dims": _change_dims,
    "type of initializer": _change_tensor_type,
    "drop initializer": _drop_initializer,
    "name of initializer": _rename_initializer,
    "external": _change_external,
    "inline": _inline_external,
    "interface": _change_value,
    "opset": _change_opset,
    "IR version": _change_version,
    "drop graph": _drop_graph,
}


MODEL: dict[str, Change] = {what: partial(_change_onnx, what=what) for what in _ONNX}
