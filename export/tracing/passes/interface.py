"""Inputs and outputs get the names that all our packages have.

1. Inputs and outputs keep transformers' names; past and present become `past_key_values.N.key|value` and
   `present.N.key|value`.
2. The input `position_ids` goes: a position is the number of real tokens before it in its row,
   Max(CumSum(attention_mask) - 1, 0), of the last S.
3. Free dimensions get names: `batch_size`, `sequence_length`, `past_sequence_length`, `total_sequence_length`.

Only decoders have 2, and past and present. With an encoder beside it a decoder's are of its attention to itself; the
others are made by the pass on cross-attention.

Left alone: the order of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dense2moe.export import names
from dense2moe.export.nodes.writer import GraphWriter, int64
from dense2moe.export.tracing.tracer import Trace


def name_interface(trace: Trace, graph: GraphWriter) -> None:
    """Name inputs and outputs, and compute the positions."""
    traced, known = trace.model.graph, trace.interface.inputs
    given = list(traced.inputs)
    assert len(given) == len(known) + 2 * trace.num_cached, f"the trace reads {[value.name for value in given]}"
    values = dict(zip(known, given, strict=False))
    for name, value in values.items():
        assert value.shape is not None
        value.name = name
        value.shape = ir.Shape([known[name].axes.get(axis, size) for axis, size in enumerate(value.shape)])
    if not trace.interface.has_cache:
        for number, name in enumerate(trace.outputs):
            value = traced.outputs[number]
            if names.is_hidden(str(value.name)):  # the last layer's tap keeps its name
                shown = graph.op("Identity", [value], name)
                shown.shape, shown.type = value.shape, value.type
                traced.extend(graph.take_nodes())
                traced.outputs[number] = shown
            else:
                value.name = name
        _name_free_axes(traced.outputs)
        return
    attended: names.Attended | None = "decoder" if trace.interface.part == "decoder" else None
    past, present = given[len(known) :], traced.outputs[1 : 1 + 2 * trace.num_cached]
    _name_states(past, [names.past(*place, attended) for place in _places(trace)], "past_sequence_length")
    _name_states(present, [names.present(*place, attended) for place in _places(trace)], "total_sequence_length")
    logits = traced.outputs[0]
    assert logits.shape is not None
    logits.name, logits.shape = names.LOGITS, ir.Shape(["batch_size", "sequence_length", logits.shape[2]])
    if names.POSITION_IDS in values:
        ids, mask, positions = (values[name] for name in (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS))
        _compute_positions(trace, graph, ids, mask, positions)


def _places(trace: Trace) -> list[tuple[int, names.CacheKind]]:
    return [(layer, kind) for layer in range(trace.num_cached) for kind in names.CACHE_KINDS]


def _name_states(states: Sequence[ir.Value], own: Sequence[str], length: str) -> None:
    for value, name in zip(states, own, strict=True):
        assert value.shape is not None
        _, heads, _, width = value.shape
        value.name, value.shape = name, ir.Shape(["batch_size", heads, length, width])


def _name_free_axes(outputs: Sequence[ir.Value]) -> None:
    """Name the free axes of outputs: the batch, then by place."""
    for value in outputs:
        if value.shape is not None:
            fixed = [size if isinstance(size, int) else None for size in value.shape]
            named = ["batch_size", "sequence_length", *(f"axis_{axis}" for axis in range(2, len(fixed)))]
            value.shape = ir.Shape([own if size is None else size for own, size in zip(named, fixed, strict=False)])


def _compute_positions(trace: Trace, graph: GraphWriter, ids: ir.Value, mask: ir.Value, positions: ir.Value) -> None:
    one, zero = graph.constant("one", int64(1)), graph.constant("zero", int64(0))
    count = graph.op("CumSum", [mask, graph.constant("axis_one", np.array(1, np.int64))], "count")
    slots = graph.op("Max", [graph.op("Sub", [count, one], "count_before"), zero], "count_positive")
    total = graph.op("Gather", [graph.op("Shape", [mask], "mask_shape"), one], "total")
    length = graph.op("Gather", [graph.op("Shape", [ids], "input_shape"), one], "length")
    begin = graph.op("Sub", [total, length], "begin")
    found = graph.op("Slice", [slots, begin, total, one], "computed_positions")
    found.shape, found.type = positions.shape, positions.type
    traced = trace.model.graph
    traced.insert_before(traced[0], graph.take_nodes())
    positions.replace_all_uses_with(found)
    traced.inputs.remove(positions)
    found.name = names.POSITION_IDS
