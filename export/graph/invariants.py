"""Invariants of every written graph: float32 routing, integers where experts are quantized.

The file is read and walked as any runtime would read it; what the builder meant does not count, and names do not
either. What the file must hold is known from the twin: its tensors, and which of them are quantized.

1. Every router, selection bias and norm of the twin lies in the file bit by bit, in float32, and is used so: nothing
   rounds what a router multiplies, and what a bias is added to. Parameters that a graph may do without are excepted.
2. From a router's product on, everything that decides which experts a token visits, and with which weight, is float32.
   The one exception is an operator that routes by itself and takes logits in the type that it computes in
   (`gates/logits.py` says what is done about that).
3. Tokens that have been sent to experts are multiplied by integers, where experts are quantized.
4. Every matrix is accounted for: those that products read as floats have as many elements as the twin leaves floats,
   those that they read as integers at least as many as it quantizes; more only by neurons of zeros that fill a block.

In a graph with branches all four hold whichever way it goes; the fourth not where keys and values of an encoder's
output are read from the cache, and so are not made. An encoder and a decoder hold them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from dense2moe.export.coverage import find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.branches import take_branches
from dense2moe.export.names import attends_to_encoder
from dense2moe.export.quantization.bits import plan_classes
from dense2moe.export.quantization.parameters import find_unread, has_tied_head, norms_add_one
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.storage import MODEL_NAME, find_graph
from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES
from dense2moe.upcycle.models.parts import TensorClass, layer_of

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INTEGERS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT4, TensorProto.INT4)
_NORMS = (
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "LayerNormalization",
    "SkipLayerNormalization",
    "RMSNormalization",
)
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat")
_ROUTERS_BY_THEMSELVES: Final[dict[str, tuple[int, ...]]] = {"MoE": (2, 4, 6), "QMoE": (2, 5, 8)}
"""Operators that take router logits, and which of their inputs are matrices."""
_LOGITS = (1, 14)
"""Inputs of theirs that route."""
_VIEWS = ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten")
_TRUTHS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf")
_PLACES = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")


def check_graphs(directory: Path, twin: Twin, files: Sequence[str] = (MODEL_NAME,)) -> None:
    """Check a package's graphs against its twin.

    `files` are theirs in `directory`.

    Raises:
        ExportError: one of the four does not hold.
    """
    paths = [find_graph(directory, name) for name in files]
    models = [take_branches(onnx.load(path, load_external_data=False)) for path in paths]
    for way in itertools.product(*models):
        graphs = [_Graph(path.parent, model.graph) for path, model in zip(paths, way, strict=True)]
        _check_way(graphs, directory, twin)


def _check_way(graphs: Sequence[_Graph], directory: Path, twin: Twin) -> None:
    """Check one way through a package's graphs."""
    entries = twin.checkpoint.entries
    classes = plan_classes(twin.checkpoint.config, {name: entry.shape for name, entry in entries.items()})
    unused, is_unread = _gates_of_nothing(twin), find_unread(twin.checkpoint.config)
    exact = {
        name: kind
        for name, kind in classes.items()
        if kind in ("router", "norm") and entries[name].num_elements and name not in unused
    }
    values = {name: twin.checkpoint.read(name).float().numpy() for name in exact}
    quantized = {
        layer_of(name) for name, kind in classes.items() if kind == "experts" and name in twin.scheme["tensors"]
    }
    held: set[str] = set()
    found = [0, 0]
    for graph in graphs:
        graph.check_norms()
        places = graph.find(values)
        if norms_add_one(twin.checkpoint.config):  # a traced graph may have folded the sum
            places |= graph.find({name: 1 + value for name, value in values.items() if name not in places})
        held |= places.keys()
        _check_exact(graph, {name: kind for name, kind in exact.items() if name in places}, places, quantized)
        kept = {place for name, own in places.items() if exact[name] == "norm" for place in own}
        found = [sum(pair) for pair in zip(found, graph.count_elements(kept), strict=True)]
    for name, kind in exact.items():
        if name not in held and not is_unread(name):
            raise ExportError(f"{directory}: the graph does not hold '{name}' in float32; a {kind} must not be rounded")
    if not any(graph.reads_encoded for graph in graphs):
        _check_elements(directory, found, twin, classes)


def _check_exact(
    graph: _Graph, exact: dict[str, TensorClass], places: dict[str, list[str]], quantized: Container[int]
) -> None:
    """Check the first three invariants for what a graph holds."""
    routed: dict[str, tuple[NodeProto, str]] = {}
    for name, kind in exact.items():
        for place in places[name]:
            graph.check_float32(place, name)
            if kind == "router" and not name.endswith(SELECTION_BIASES):
                routed |= {product.output[0]: (product, name) for product in graph.find_products(place, name)}
        if kind == "router" and name.endswith(SELECTION_BIASES):
            graph.check_added(places[name], name)
    for product, name in routed.values():
        graph.check_routing(product, name, layer_of(name) in quantized)


def _gates_of_nothing(twin: Twin) -> set[str]:
    """The gates of shared experts of width 0, which no graph needs."""
    config, entries = twin.checkpoint.config, twin.checkpoint.entries
    shared = None if find_refusal(config) is not None else twin.family.shared
    if shared is None or twin.family.find("shared_scale") is None:
        return set()
    ups = {n: entries.get(shared.up.format(layer=n)) for n in range(config.num_hidden_layers)}
    return {twin.family.name("shared_scale", n) for n, up in ups.items() if up is not None and not up.num_elements}


def _check_elements(directory: Path, found: Sequence[int], twin: Twin, classes: dict[str, TensorClass]) -> None:
    """Check the fourth invariant: element types of all products' matrices.

    Floats and integers are counted in `found`. Vectors do not count, such as a gate with one output, nor do
    initializers that are kept as they are, such as the matrices of a traced Conv1D.
    """
    floats = integers = unread = 0
    is_unread = find_unread(twin.checkpoint.config)
    multiplied = (
        "experts",
        "attention",
        "router",
        "head",
        *(("embedding",) if has_tied_head(twin.checkpoint.config) else ()),
    )
    for name, entry in twin.checkpoint.entries.items():
        if classes[name] in multiplied and _is_matrix(entry.shape):
            if name in twin.scheme["tensors"]:
                integers += entry.num_elements * (not is_unread(name))
            else:
                floats += entry.num_elements
                unread += entry.num_elements * is_unread(name)
    if found[0] not in (floats, floats - unread) or found[1] < integers:
        held = f"matrices of {found[0]:,} floats and {found[1]:,} integers"
        raise ExportError(f"{directory}: products read {held}; the twin has {floats:,} and {integers:,}")


def _is_matrix(shape: Iterable[int]) -> bool:
    return sum(size > 1 for size in shape) > 1 and math.prod(shape) > 0


class _Graph:
    """A file's graph: element types, producer and readers of every value."""

    def __init__(self, directory: Path, proto: onnx.GraphProto) -> None:
        self.directory = directory
        self.nodes = list(proto.node)
        self.initializers = {tensor.name: tensor for tensor in proto.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.types = {value.name: value.type.tensor_type.elem_type for value in (*proto.input, *proto.value_info)}
        self.types |= {name: tensor.data_type for name, tensor in self.initializers.items()}
        self.constant = set(self.initializers)
        """Values that depend on no number of the input, but for shapes."""
        for node in self.nodes:
            self.types |= {
                name: kind
                for name, kind in zip(node.output, self._output_types(node), strict=False)
                if name and kind is not None
            }
            if node.op_type in ("Shape", "Size") or all(name in self.constant for name in node.input if name):
                self.constant |= set(node.output)

    def _output_types(self, node: NodeProto) -> list[int | None]:
        first, *others = [self.types.get(name) for name in node.input] or [None]
        attributes = {attribute.name: attribute for attribute in node.attribute}
        same = [first] * len(node.output)
        match node.op_type:
            case "Cast":
                return [attributes["to"].i]
            case "Constant":
                return [attributes["value"].t.data_type if "value" in attributes else None]
            case "ConstantOfShape":
                return [attributes["value"].t.data_type if "value" in attributes else TensorProto.FLOAT]
            case "QuantizeLinear":
                return [others[1] if len(others) > 1 else TensorProto.UINT8]
            case "DequantizeLinear" | "Where":
                return [others[0]]
            case "OneHot" | "GatherBlockQuantized":
                return [others[1]]
            case "TopK":
                return [first, TensorProto.INT64]
            case op if op in _TRUTHS:
                return [TensorProto.BOOL]
            case op if op in _PLACES:
                return [TensorProto.INT64]
            case _:
                return same

    @property
    def reads_encoded(self) -> bool:
        """Whether keys and values of an encoder's output are cached."""
        return any(attends_to_encoder(name) for name in self.readers)

    def _refuse(self, node: NodeProto, what: str) -> ExportError:
        return ExportError(f"{self.directory}: node '{node.name}' ({node.op_type}) {what}")

    def _name(self, kind: int | None) -> str:
        return "an unknown type" if kind is None else TensorProto.DataType.Name(kind).lower()

    def find(self, wanted: dict[str, Any]) -> dict[str, list[str]]:
        """Float32 initializers that equal these arrays or their transposes, bitwise."""
        sizes = {array.size for array in wanted.values()}
        held: dict[bytes, list[str]] = {}
        for name, tensor in self.initializers.items():
            if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) in sizes:
                held.setdefault(self._read(tensor), []).append(name)
        found = {
            name: {*held.get(array.tobytes(), ()), *held.get(np.ascontiguousarray(array.T).tobytes(), ())}
            for name, array in wanted.items()
        }
        return {name: sorted(places) for name, places in found.items() if places}

    def _read(self, tensor: TensorProto) -> bytes:
        own = TensorProto()
        own.CopyFrom(tensor)
        if own.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(own, str(self.directory))
        array: Any = onnx.numpy_helper.to_array(own)
        return bytes(np.ascontiguousarray(array).tobytes())

    def check_norms(self) -> None:
        """Check that norms read, scale and return float32."""
        for node in self.nodes:
            if node.op_type in _NORMS:
                self._check_node(node, "normalizes")

    def check_float32(self, place: str, tensor: str) -> None:
        """Check that an initializer's readers read float32 only."""
        for node in self.readers.get(place, ()):
            self._check_node(node, f"reads '{tensor}'")

    def _check_node(self, node: NodeProto, what: str) -> None:
        for name in (*node.input, *node.output):
            kind = self.types.get(name) if name else TensorProto.FLOAT
            if kind in _FLOATS and kind != TensorProto.FLOAT:
                raise self._refuse(node, f"{what} in {self._name(kind)}; it must be float32")

    def check_added(self, places: Iterable[str], tensor: str) -> None:
        """Check that a selection bias is added to something.

        Where several initializers equal the bias, one of them must be added.
        """
        if all(node.op_type != "Add" for place in places for node in self.readers.get(place, ())):
            raise ExportError(f"{self.directory}: the graph adds '{tensor}' to nothing; it must choose experts")

    def find_products(self, place: str, tensor: str) -> list[NodeProto]:
        """Products by a router, with nothing rounded on the way.

        Neither the router nor its input may be rounded.
        """
        found, names = [], [place]
        while names:
            for node in self.readers.get(names.pop(), ()):
                if node.op_type in _PRODUCTS:
                    found.append(node)
                    for name in node.input:
                        self._check_unrounded(node, name, tensor)
                elif node.op_type in _VIEWS:
                    names += node.output
                elif node.op_type == "QuantizeLinear":
                    raise self._refuse(node, f"rounds '{tensor}'; a router must stay float32")
        if not found:
            raise ExportError(f"{self.directory}: the graph multiplies nothing by '{tensor}'")
        return found

    def _check_unrounded(self, product: NodeProto, name: str, tensor: str) -> None:
        while (maker := self.maker.get(name)) is not None and maker.op_type in (*_VIEWS, "Cast", "DequantizeLinear"):
            kind = self.types.get(maker.input[0])
            if maker.op_type == "DequantizeLinear" or (maker.op_type == "Cast" and kind != TensorProto.FLOAT):
                raise self._refuse(
                    product, f"multiplies '{tensor}' by values rounded to {self._name(kind)}; they must be float32"
                )
            name = maker.input[0]

    def check_routing(self, product: NodeProto, tensor: str, quantized: bool) -> None:
        """Check the second and the third invariant for one router.

        A value is of the routing if it depends on the router's product and constants alone; of an expert if routing
        chose its rows; mixed where routing's weights have met experts' outputs, which ends the walk.
        """
        kinds = dict.fromkeys(product.output, "routing")
        begin = next(number for number, node in enumerate(self.nodes) if node is product)
        for node in self.nodes[begin + 1 :]:
            own = [kinds[name] for name in node.input if name in kinds]
            if not own:
                continue
            weighs = any(kinds.get(name) == "routing" and self.types.get(name) in _FLOATS for name in node.input)
            others = any(name and name not in kinds and name not in self.constant for name in node.input)
            if "mixed" in own or node.op_type in _ROUTERS_BY_THEMSELVES:
                kind = "mixed"
            elif weighs and ("expert" in own or others):
                self._check_node(node, f"weighs what experts chosen by '{tensor}' say")
                kind = "mixed"
            elif "expert" in own or others:
                kind = "expert"
                if quantized and node.op_type in _PRODUCTS and not self._reads_integers(node):
                    raise self._refuse(node, "multiplies an expert's tokens by floats; its weights must be integers")
            else:
                kind = "routing"
                self._check_choice(node, tensor)
            kinds |= dict.fromkeys((name for name in node.output if name), kind)

    def _check_choice(self, node: NodeProto, tensor: str) -> None:
        for name in node.output:
            kind = self.types.get(name)
            rounded = node.op_type == "QuantizeLinear" or (kind in _FLOATS and kind != TensorProto.FLOAT)
            if rounded and not all(self._routes_by_itself(reader, name) for reader in self.readers.get(name, ())):
                raise self._refuse(
                    node, f"rounds to {self._name(kind)} what chooses experts by '{tensor}'; it must be float32"
                )

    def _routes_by_itself(self, node: NodeProto, name: str) -> bool:
        return node.op_type in _ROUTERS_BY_THEMSELVES and all(
            place in _LOGITS for place, read in enumerate(node.input) if read == name
        )

    def _matrices(self, node: NodeProto) -> list[TensorProto]:
        """Initializers that a product multiplies by.

        Through nodes that dequantize, widen or transpose them.
        """
        if node.op_type in _ROUTERS_BY_THEMSELVES:
            names = [node.input[place] for place in _ROUTERS_BY_THEMSELVES[node.op_type] if place < len(node.input)]
        else:
            names = list(node.input[:2])
        found = []
        for start in names:
            name = start
            while (maker := self.maker.get(name)) is not None and maker.op_type in (
                *_VIEWS,
                "Cast",
                "DequantizeLinear",
            ):
                name = maker.input[0]
            if name in self.initializers:
                found.append(self.initializers[name])
        return found

    def _reads_integers(self, node: NodeProto) -> bool:
        matrices = self._matrices(node)
        return bool(matrices) and all(tensor.data_type in _INTEGERS for tensor in matrices)

    def count_elements(self, kept: Container[str]) -> tuple[int, int]:
        """Elements of all products' matrices but the `kept` ones: floats, and integers."""
        floats: dict[str, int] = {}
        integers: dict[str, int] = {}
        for node in self.nodes:
            if node.op_type not in _PRODUCTS and node.op_type not in _ROUTERS_BY_THEMSELVES:
                continue
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            for tensor in self._matrices(node):
                size = math.prod(tensor.dims)
                if node.op_type == "MatMulNBits":
                    integers[tensor.name] = attributes["K"] * attributes["N"]
                elif node.op_type == "QMoE":
                    integers[tensor.name] = size * 8 // attributes["expert_weight_bits"]
                elif tensor.data_type in _INTEGERS:
                    integers[tensor.name] = size
                elif _is_matrix(tensor.dims) and tensor.name not in kept:
                    floats[tensor.name] = size
        return sum(floats.values()), sum(integers.values())
