"""Keys and values of an encoder's output are computed once.

The trace of a decoder with an encoder beside it computes them at every call. They are read from the cache then.

1. Each layer's attention to the encoder → `If(use_cache_branch)`. One branch reads `past_key_values.N.encoder.key` and
   `.value`; the other has the products that make them, with their weights. Both end where the heads stand side by side,
   so that a step copies no key and no value, and everything else of the layer is in the graph once.
2. What the products made is given as `present.N.encoder.key` and `.value`. Of a call that reads the cache these are
   empty: the caller keeps what it has, as optimum and transformers.js do.
3. Inputs and outputs are ordered by layer, `decoder` before `encoder`, as optimum counts them; the encoder's output is
   not given back.

Left alone: any other graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dense2moe.export import names
from dense2moe.export.nodes.writer import int64
from dense2moe.export.tracing.marking import DOMAIN
from dense2moe.export.tracing.tracer import Trace


@dataclass(frozen=True)
class CrossAttention:
    """A layer's attention to the encoder.

    Its keys and values, the nodes that read them, and what these give to the product behind.
    """

    states: tuple[ir.Value, ir.Value]
    core: tuple[ir.Node, ...]
    attended: ir.Value


def find_cross_attentions(trace: Trace) -> tuple[CrossAttention, ...]:
    """Every layer's attention to the encoder.

    The graph's products are markers yet, which tell where it ends.
    """
    if trace.interface.part != "decoder":
        return ()
    begin = 1 + 2 * trace.num_cached
    states = trace.model.graph.outputs[begin : begin + 2 * trace.num_cached]
    return tuple(_find_cross_attention(keys, values) for keys, values in zip(states[::2], states[1::2], strict=True))


def _find_cross_attention(keys: ir.Value, values: ir.Value) -> CrossAttention:
    core: dict[ir.Node, None] = {}
    ends: dict[ir.Value, None] = {}
    reached = [keys, values]
    while reached:
        value = reached.pop()
        for node, _ in value.uses():
            if node.domain == DOMAIN:
                ends[value] = None
            elif node not in core:
                core[node] = None
                reached += node.outputs
    assert len(ends) == 1, f"{keys.name} is attended to by {len(ends)} products"
    return CrossAttention((keys, values), tuple(core), next(iter(ends)))


def branch_cross_attentions(trace: Trace, attentions: Sequence[CrossAttention]) -> None:
    """Put every attention to the encoder behind a branch."""
    if trace.interface.part != "decoder":
        return
    graph = trace.model.graph
    places = {node: number for number, node in enumerate(graph)}
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    begin = len(inputs) - 2 * trace.num_cached
    ordered_inputs, ordered_outputs = inputs[:begin], outputs[:1]
    use_cache = ir.Value(name=names.USE_CACHE_BRANCH, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    graph.outputs[:] = outputs[: 1 + 2 * trace.num_cached]
    for layer, attention in enumerate(attentions):
        past, present = _add_branches(graph, layer, attention, use_cache, places)
        ordered_inputs += [*inputs[begin + 2 * layer : begin + 2 * layer + 2], *past]
        ordered_outputs += [*outputs[1 + 2 * layer : 3 + 2 * layer], *present]
    graph.inputs[:] = [*ordered_inputs, use_cache]
    graph.outputs[:] = ordered_outputs
    graph.remove([node for value in outputs[1 + 4 * trace.num_cached :] if (node := value.producer()) is not None])


def _add_branches(
    graph: ir.Graph, layer: int, attention: CrossAttention, use_cache: ir.Value, places: Mapping[ir.Node, int]
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Write a layer's `If`; the cached inputs and outputs that it makes."""
    start = names.in_layer(layer, "cross_attention")
    core = sorted(attention.core, key=places.__getitem__)
    past = [_new_state(state, names.past(layer, kind, "encoder")) for state, kind in _by_kind(attention)]
    present = [_new_state(state, names.present(layer, kind, "encoder")) for state, kind in _by_kind(attention)]
    cached = _write_cached(f"{start}.cached", attention, core, past)
    attended = ir.Value(name=start, type=attention.attended.type, shape=attention.attended.shape)
    node = ir.Node("", "If", [use_cache], outputs=[attended, *present], name=f"{start}/If")
    graph.insert_after(core[-1], node)
    attention.attended.replace_all_uses_with(attended)
    makers = _find_makers(graph, attention.states)
    graph.remove([*makers, *core])
    weights = _take_initializers(graph, makers)
    encoded = ir.Graph(
        [],
        [attention.attended, *attention.states],
        nodes=[*makers, *core],
        initializers=weights,
        name=f"{start}.encoded",
    )
    for name, branch in (("then_branch", cached), ("else_branch", encoded)):
        node.attributes[name] = ir.Attr(name, ir.AttributeType.GRAPH, branch)
    return past, present


def _by_kind(attention: CrossAttention) -> Iterable[tuple[ir.Value, names.CacheKind]]:
    return zip(attention.states, names.CACHE_KINDS, strict=True)


def _new_state(state: ir.Value, name: str) -> ir.Value:
    """A cached key or value of the encoder's output."""
    assert state.shape is not None
    _, heads, _, width = state.shape
    shape = ir.Shape(["batch_size", heads, "encoder_sequence_length", width])
    return ir.Value(name=name, type=state.type, shape=shape)


def _write_cached(name: str, attention: CrossAttention, core: Sequence[ir.Node], past: Sequence[ir.Value]) -> ir.Graph:
    """The branch that reads keys and values from the cache."""
    known = dict(zip(attention.states, past, strict=True))
    nodes = []
    for node in core:
        outputs = [ir.Value(name=f"{name}.{each.name}", type=each.type, shape=each.shape) for each in node.outputs]
        inputs = [None if each is None else known.get(each, each) for each in node.inputs]
        attributes = list(node.attributes.values())
        nodes.append(
            ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{name}.{node.name}")
        )
        known |= dict(zip(node.outputs, outputs, strict=True))
    bounds = [_constant(f"{name}.{bound}", value) for bound, value in (("start", 0), ("end", 0), ("axis", 2))]
    empty = [ir.Value(name=f"{name}.no_{kind}", type=state.type) for state, kind in _by_kind(attention)]
    nodes += [
        ir.Node("", "Slice", [state, *bounds], outputs=[nothing], name=f"{nothing.name}/Slice")
        for state, nothing in zip(past, empty, strict=True)
    ]
    return ir.Graph([], [known[attention.attended], *empty], nodes=nodes, initializers=bounds, name=name)


def _constant(name: str, value: int) -> ir.Value:
    tensor = ir.tensor(int64(value), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)


def _find_makers(graph: ir.Graph, states: Collection[ir.Value]) -> list[ir.Node]:
    """The nodes that make keys and values alone, in order."""
    makers: dict[ir.Node, None] = {}
    for node in reversed(graph):
        readers = {reader for value in node.outputs for reader, _ in value.uses()}
        if any(value in states for value in node.outputs) or (readers and readers <= makers.keys()):
            makers[node] = None
    return list(makers)[::-1]


def _take_initializers(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """Take initializers that these nodes alone read out of a graph.

    The nodes are no part of it any more.
    """
    inside = set(nodes)
    read = dict.fromkeys(value for node in inside for value in node.inputs if value is not None)
    own = [
        value
        for value in read
        if value.is_initializer() and value.graph is graph and all(reader in inside for reader, _ in value.uses())
    ]
    for value in own:
        assert value.name is not None
        del graph.initializers[value.name]
    return own
