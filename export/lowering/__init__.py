"""Lowerings of a mixture-of-experts layer, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, assert_never

import onnx_ir as ir

from export.errors import ExportError
from export.graph import GraphWriter
from export.lowering import moe, qmoe, unrolled
from export.lowering.layer import Expert, MoeLayer

__all__ = ["Expert", "Lowering", "MoeLayer", "choose_lowering"]


@dataclass(frozen=True)
class Lowering:
    """A way to write a layer: what it refuses, how it writes, and the oldest runtime that computes it rightly."""

    name: str
    min_onnxruntime: Callable[[MoeLayer], str]
    refusal: Callable[[MoeLayer], str | None]
    lower: Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value], ir.Value]


MOE = Lowering(moe.NAME, lambda _: moe.MIN_ONNXRUNTIME, moe.refusal, moe.lower)
QMOE = Lowering(qmoe.NAME, qmoe.min_onnxruntime, qmoe.refusal, qmoe.lower)
UNROLLED = Lowering(unrolled.NAME, lambda _: unrolled.MIN_ONNXRUNTIME, unrolled.refusal, unrolled.lower)


def choose_lowering(layer: MoeLayer, wish: Literal["auto", "fused", "unrolled"]) -> Lowering:
    """The lowering for a layer.

    Raises:
        ExportError: the one asked for cannot express the layer, or none can.
    """
    fused = QMOE if layer.quantized else MOE
    match wish:
        case "auto":
            candidates = [fused, UNROLLED]
        case "fused":
            candidates = [fused]
        case "unrolled":
            candidates = [UNROLLED]
        case _:
            assert_never(wish)
    reasons = []
    for candidate in candidates:
        reason = candidate.refusal(layer)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    remedy = "use 'auto'" if any(other.refusal(layer) is None for other in (fused, UNROLLED)) else "no lowering can"
    raise ExportError(f"export.lowering '{wish}' cannot express {layer.name} ({'; '.join(reasons)}); {remedy}")
