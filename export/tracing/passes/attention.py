"""Attention of encoders becomes `MultiHeadAttention`.

1. `Attention(q, k, v)` → `MultiHeadAttention` of [B, S, h d], and `Reshape` to [B, S, h, e]. A value that is the
   `Transpose` of [B, S, h, d] is read as it lay before.
2. With a mask → its `attention_bias`: 0 where a key may be read, the lowest float32 where it may not. What a query
   gives that may read no key is multiplied by 0, as torch gives zeros there: such are the rows of a text that is
   padding alone.
3. A mask that is true everywhere, as of images → 1.

Left alone: attention that is no marker (`dense2moe.export.tracing.attention` tells which), as of decoders with a cache.

The operator's kernel for the CPU computes [8, 12, 128, 64] without a mask in 0.73 of the time of the nodes that torch
writes with one, and with one in 0.85 (onnxruntime 1.32).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter, int64
from dense2moe.export.tracing.passes.markers import find_nodes, replace_marker
from dense2moe.export.tracing.tracer import Trace

_SWAPPED = (0, 2, 1, 3)


def lower_attention(trace: Trace, graph: GraphWriter) -> None:
    """Replace every `Attention`."""
    masks: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for number, marker in enumerate(find_nodes(trace, "Attention")):
        name = f"attention.{number}"
        query, key, value, mask = [*marker.inputs, None][:4]
        assert query is not None
        assert key is not None
        assert value is not None
        heads, width = _size(query, 1), _size(value, 3)
        inputs: list[ir.Value | None] = [
            _join_heads(graph, x, f"{name}.{kind}") for kind, x in (("query", query), ("key", key), ("value", value))
        ]
        attributes = {"num_heads": heads, "scale": marker.attributes["scale"].as_float()}
        if mask is None or _is_true_everywhere(mask):
            attended = graph.op("MultiHeadAttention", inputs, name, attributes, MICROSOFT)
            replace_marker(trace, marker, graph, _split_heads(graph, attended, heads, width, f"{name}.heads"))
            continue
        if mask not in masks:
            masks[mask] = _add_mask(graph, mask, f"attention_mask.{len(masks)}")
        bias, reads_any = masks[mask]
        attended = graph.op("MultiHeadAttention", [*inputs, None, None, bias], name, attributes, MICROSOFT)
        split = _split_heads(graph, attended, heads, width, f"{name}.heads")
        replace_marker(trace, marker, graph, graph.op("Mul", [split, reads_any], f"{name}.of_readers"))


def _size(x: ir.Value, axis: int) -> int:
    """A size that a trace leaves no choice of."""
    assert x.shape is not None
    size = x.shape[axis]
    assert isinstance(size, int), f"{x.name}: axis {axis} is free; heads and their widths are a model's own"
    return size


def _join_heads(graph: GraphWriter, x: ir.Value, name: str) -> ir.Value:
    """[B, S, h d] of [B, h, S, d]."""
    producer = x.producer()
    if (
        producer is not None
        and producer.op_type == "Transpose"
        and tuple(producer.attributes["perm"].as_ints()) == _SWAPPED
    ):
        (swapped,) = producer.inputs
        assert swapped is not None
    else:
        swapped = graph.op("Transpose", [x], f"{name}_swapped", {"perm": list(_SWAPPED)})
    return graph.op("Reshape", [swapped, graph.constant("joined_heads", int64(0, 0, -1))], name)


def _split_heads(graph: GraphWriter, x: ir.Value, heads: int, width: int, name: str) -> ir.Value:
    """[B, S, h, e] of [B, S, h e]."""
    return graph.op("Reshape", [x, graph.constant(f"heads_{heads}_{width}", int64(0, 0, heads, width))], name)


def _add_mask(graph: GraphWriter, mask: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """What is added to scores, and which queries may read.

    The latter is 1 for queries that may read a key, else 0, [B or 1, S, h or 1, 1].
    """
    to_float = {"to": int(ir.DataType.FLOAT)}
    hidden = graph.op("Cast", [graph.op("Not", [mask], f"{name}.hidden")], f"{name}.hidden_float", to_float)
    lowest = graph.constant("lowest", np.array(np.finfo(np.float32).min, np.float32))
    bias = graph.op("Mul", [hidden, lowest], f"{name}.bias")
    seen = graph.op("Cast", [mask], f"{name}.seen_float", to_float)
    any_seen = graph.op("ReduceMax", [seen, graph.constant("axis_last", int64(-1))], f"{name}.any", {"keepdims": 1})
    return bias, graph.op("Transpose", [any_seen], f"{name}.reads_any", {"perm": list(_SWAPPED)})


def _is_true_everywhere(mask: ir.Value) -> bool:
    producer = mask.producer()
    while producer is not None and producer.op_type == "Expand" and producer.inputs[0] is not None:
        mask = producer.inputs[0]
        producer = mask.producer()
    return mask.const_value is not None and bool(mask.const_value.numpy().all())
