"""Lowerings of a mixture-of-experts layer, and those that can express one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from export.errors import ExportError
from export.graph import GraphWriter
from export.lowering import grouped, moe, qmoe, unrolled
from export.lowering.layer import Expert, MoeLayer
from export.lowering.top_k import add_logits

__all__ = ["Expert", "Lowering", "LoweringWish", "MoeLayer", "find_lowerings"]

LowerLogits = Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value], ir.Value]
LowerChosen = Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value, ir.Value], ir.Value]
LoweringWish = Literal["auto", "fused", "grouped", "unrolled"]


@dataclass(frozen=True)
class Lowering:
    """A way to write a layer: what it refuses, how it writes, and the oldest runtime that computes it rightly.

    `lower` takes hidden [B, S, H] and router logits [B * S, E]; `lower_chosen` takes hidden [B * S, H] and, for each token, weights and numbers
    [B * S, k] of the experts that it visits: any routing at all.
    """

    name: str
    min_onnxruntime: Callable[[MoeLayer], str]
    refusal: Callable[[MoeLayer], str | None]
    lower: LowerLogits
    lower_chosen: LowerChosen


def _of_logits(lower: LowerLogits) -> LowerChosen:
    """A lowering of chosen experts and their weights, by one that does softmax and top-k itself."""

    def lower_chosen(graph: GraphWriter, layer: MoeLayer, hidden: ir.Value, weights: ir.Value, chosen: ir.Value) -> ir.Value:
        logits, total_T1 = add_logits(graph, layer.routing.num_experts, weights, chosen, layer.name)
        return graph.op("Mul", [lower(graph, layer, hidden, logits), total_T1], f"{layer.name}.output_weighted")

    return lower_chosen


MOE = Lowering(moe.NAME, lambda _: moe.MIN_ONNXRUNTIME, moe.refusal, moe.lower, _of_logits(moe.lower))
QMOE = Lowering(qmoe.NAME, qmoe.min_onnxruntime, qmoe.refusal, qmoe.lower, _of_logits(qmoe.lower))
GROUPED = Lowering(grouped.NAME, lambda _: grouped.MIN_ONNXRUNTIME, grouped.refusal, grouped.lower, grouped.lower_chosen)
UNROLLED = Lowering(unrolled.NAME, lambda _: unrolled.MIN_ONNXRUNTIME, unrolled.refusal, unrolled.lower, unrolled.lower_chosen)


def find_lowerings(layer: MoeLayer, wish: LoweringWish) -> tuple[Lowering, ...]:
    """The lowerings that fit the wish and can express the layer: all of those where the wish is `auto`.

    Raises:
        ExportError: none can.
    """
    fused = QMOE if layer.quantized else MOE
    every = (fused, GROUPED, UNROLLED)
    wished = {"auto": every, "fused": (fused,), "grouped": (GROUPED,), "unrolled": (UNROLLED,)}[wish]
    found = tuple(lowering for lowering in wished if lowering.refusal(layer) is None)
    if found:
        return found
    reasons = "; ".join(f"{lowering.name}: {lowering.refusal(layer)}" for lowering in wished)
    remedy = "use 'auto'" if any(lowering.refusal(layer) is None for lowering in every) else "no lowering can"
    raise ExportError(f"export.lowering '{wish}' cannot express {layer.name} ({reasons}); {remedy}")
