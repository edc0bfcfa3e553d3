"""Positions, masks and rotary tables, shared by all attention layers.

A longrope has two tables, one below the other, and a position is a row in them. Where the longest row of the batch has
more tokens than the model was first trained for, every position moves down to the long table, as transformers chooses:
by the batch, at each call, cached keys staying as they are. Across that switch attention no longer depends on distances
alone, so there a position is the number of real tokens before it, as transformers counts, and not a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from dense2moe.export import names
from dense2moe.export.nodes.writer import GraphWriter, int64
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.rotary import make_rotary, rotary_switch
from dense2moe.export.variant import ElementType

_MASKED: dict[ElementType, float] = {"float32": -1e30, "float16": -3e4, "bfloat16": -1e30}
"""Finite, as is its sum with any score: a row of nothing but padding then averages instead of dividing zero by zero.

Below float16's lowest number,
-65504, a score would take the sum to minus infinity, so it is half of that; e to the power of it is zero all the same.
"""


@dataclass(frozen=True)
class Positions:
    """Inputs that attention layers share, among them a bias for each window.

    The window None is full attention.

    Tables and biases are of the element type.
    """

    seqlens_k: ir.Value
    total_length: ir.Value
    cos: ir.Value
    sin: ir.Value
    position_ids: ir.Value
    attention_bias: Mapping[int | None, ir.Value]


def add_positions(graph: GraphWriter, twin: Twin, input_ids: ir.Value, attention_mask: ir.Value) -> Positions:
    """Row lengths, rotary tables, positions and masks, from the attention mask alone.

    The mask is [B, T]; masks that come of it are of padding and of windows.
    """
    one, zero = graph.constant("one", int64(1)), graph.constant("zero", int64(0))
    shape = graph.op("Shape", [attention_mask], "mask_shape")
    batch = graph.op("Gather", [shape, zero], "batch")
    total = graph.op("Gather", [shape, one], "total")
    length = graph.op("Gather", [graph.op("Shape", [input_ids], "input_shape"), one], "length")
    total_length = graph.op(
        "Squeeze", [graph.op("Cast", [total], "total_int32", {"to": int(ir.DataType.INT32)})], "total_length"
    )
    last_slot = graph.op(
        "Cast", [graph.op("Sub", [total, one], "last_slot")], "last_slot_int32", {"to": int(ir.DataType.INT32)}
    )
    seqlens_k = graph.op("Expand", [last_slot, batch], "seqlens_k")
    count = graph.op("CumSum", [attention_mask, graph.constant("axis_one", np.array(1, np.int64))], "count")
    begin = graph.op("Sub", [total, length], "begin")
    switch = rotary_switch(twin.checkpoint.config)
    if switch is None:  # slot of the row's first real token, plus real tokens before it
        first = graph.op("ArgMax", [attention_mask], "first_slot", {"axis": 1, "keepdims": 1})
        slots = graph.op("Sub", [graph.op("Add", [count, first], "slot_after"), one], "slots")
        # Padding has position 0: GroupQueryAttention on the CPU rotates a prompt, all its rows, from the position of
        # the first row's first token on.
        slots = graph.op("Mul", [slots, attention_mask], "real_slots")
    else:
        slots = graph.op("Max", [graph.op("Sub", [count, one], "count_before"), zero], "count_positive")
        slots = graph.op("Add", [slots, _add_table_start(graph, switch, count)], "table_rows")
    position_ids = graph.op("Slice", [slots, begin, total, one], names.POSITION_IDS)
    is_padding = graph.op("Equal", [attention_mask, zero], "is_padding")
    masked, open_ = _masked(graph), graph.constant("open", graph.number(0))
    bias_BT = graph.op("Where", [is_padding, masked, open_], "bias_row")
    bias_B11T = graph.op("Unsqueeze", [bias_BT, graph.constant("axes_one_two", int64(1, 2))], "bias_column")
    full = graph.op("Concat", [one, one, length, one], "bias_shape", {"axis": 0})
    c = twin.checkpoint.config
    windows = dict.fromkeys(
        _effective(twin.family.window(c, n), c.max_position_embeddings) for n in range(c.num_hidden_layers)
    )
    biases: dict[int | None, ir.Value] = {}
    for window in windows:
        if window is None:
            biases[None] = graph.op("Expand", [bias_B11T, full], "attention_bias")
        else:
            biases[window] = _add_window(graph, window, bias_B11T, begin, total)
    cos, sin = rotary_tables(twin)
    return Positions(
        seqlens_k,
        total_length,
        graph.weight("cos", graph.dtype, tuple(cos.shape), lambda: cos),
        graph.weight("sin", graph.dtype, tuple(sin.shape), lambda: sin),
        position_ids,
        biases,
    )


def effective_window(twin: Twin, layer: int) -> int | None:
    """The window of a layer; None where it spans the context."""
    c = twin.checkpoint.config
    return _effective(twin.family.window(c, layer), c.max_position_embeddings)


def _effective(window: int | None, context: int) -> int | None:
    return None if window is None or window >= context else window


def _add_window(graph: GraphWriter, window: int, padding: ir.Value, begin: ir.Value, total: ir.Value) -> ir.Value:
    """The bias [B, 1, S, T] that hides padding and distant keys.

    `padding` is [B, 1, 1, T]; keys `window` slots and more before the query are hidden. `padding` is [B, 1, 1, T]; keys
    `window` slots and more before the query are hidden. Padding counted, as torch has it. A mask and not the operator's
    own window: that one counts from the end of the row, wherever its padding is.
    """
    name = f"window_{window}"
    last, step = graph.constant("axis_last", int64(-1)), graph.constant("step", np.array(1, np.int64))
    start = graph.constant("slot_zero", np.array(0, np.int64))
    begin_scalar, total_scalar = (
        graph.op("Squeeze", [value], f"{name}.{which}") for which, value in (("begin", begin), ("total", total))
    )
    query_S = graph.op("Range", [begin_scalar, total_scalar, step], f"{name}.query_slots")
    key_T = graph.op("Range", [start, total_scalar, step], f"{name}.key_slots")
    distance_ST = graph.op(
        "Sub", [graph.op("Unsqueeze", [query_S, last], f"{name}.query_column"), key_T], f"{name}.distance"
    )
    beyond_ST = graph.op(
        "GreaterOrEqual", [distance_ST, graph.constant(name, np.array(window, np.int64))], f"{name}.beyond"
    )
    return graph.op("Where", [beyond_ST, _masked(graph), padding], f"{name}.attention_bias")


def _masked(graph: GraphWriter) -> ir.Value:
    return graph.constant("masked", graph.number(_MASKED[graph.element_type]))


def _add_table_start(graph: GraphWriter, switch: int, count: ir.Value) -> ir.Value:
    """The row where the rotary table begins.

    0, or `switch` where the longest row of the batch, of `count` [B, T] tokens so far, is longer.
    """
    longest = graph.op("ReduceMax", [count], "longest", {"keepdims": 0})
    bound = graph.constant("rotary_switch", np.array(switch, np.int64))
    is_long = graph.op("Greater", [longest, bound], "is_long")
    return graph.op("Where", [is_long, bound, graph.constant("slot_zero", np.array(0, np.int64))], "table_start")


def rotary_tables(twin: Twin) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_position_embeddings, head_dim / 2] in float32.

    From transformers' own rotary embedding of this config.
    Of a longrope first the short table, up to the switch, and below it the long one.
    """
    c = twin.checkpoint.config
    lengths, switch = [c.max_position_embeddings], rotary_switch(c)
    if switch is not None:
        lengths.insert(0, switch)
    rotary = make_rotary(twin.family, c)
    tables = [rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None]) for length in lengths]
    half = tables[0][0].shape[-1] // 2
    cos, sin = (torch.cat([table[which][0, :, :half] for table in tables]) for which in (0, 1))
    return cos.contiguous(), sin.contiguous()
