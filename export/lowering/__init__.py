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

__all__ = ["Expert", "Lowering", "LoweringWish", "MoeLayer", "find_lowerings"]

LoweringWish = Literal["auto", "fused", "grouped", "unrolled"]


@dataclass(frozen=True)
class Lowering:
    """A way to write a layer: what it refuses, how it writes, and the oldest runtime that computes it rightly.

    `lower` takes hidden states of the graph's element type and router logits in float32, and returns float32.
    """

    name: str
    min_onnxruntime: Callable[[MoeLayer], str]
    refusal: Callable[[MoeLayer], str | None]
    lower: Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value], ir.Value]


MOE = Lowering(moe.NAME, moe.min_onnxruntime, moe.refusal, moe.lower)
QMOE = Lowering(qmoe.NAME, qmoe.min_onnxruntime, qmoe.refusal, qmoe.lower)
GROUPED = Lowering(grouped.NAME, lambda _: grouped.MIN_ONNXRUNTIME, grouped.refusal, grouped.lower)
UNROLLED = Lowering(unrolled.NAME, lambda _: unrolled.MIN_ONNXRUNTIME, unrolled.refusal, unrolled.lower)


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
