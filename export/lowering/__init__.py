"""Lowerings of a layer of experts, and which can express a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import onnxruntime as ort
from packaging.version import Version

from dense2moe.export.errors import ExportError
from dense2moe.export.lowering import grouped, moe, qmoe, switched, unrolled
from dense2moe.export.lowering.layer import Expert, MoeInput, MoeLayer
from dense2moe.export.nodes.writer import GraphWriter

__all__ = ["Expert", "Lowering", "LoweringWish", "MoeInput", "MoeLayer", "find_common_lowerings", "find_lowerings"]

LowerLogits = Callable[[GraphWriter, MoeLayer, MoeInput], ir.Value]
LowerChosen = Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value, ir.Value], ir.Value]
LoweringWish = Literal["auto", "fused", "grouped", "unrolled", "switched"]


@dataclass(frozen=True)
class Lowering:
    """A way to write a layer of experts.

    It says what it refuses, and the oldest onnxruntime that computes a layer rightly.
    `lower` takes hidden states of the graph's element type and router logits in float32, and returns float32.
    `lower_chosen` takes tokens [T, H] and, for each, weights and numbers [T, K] of the experts that it visits: any
    routes at all.
    """

    name: str
    min_onnxruntime: Callable[[MoeLayer], str]
    refusal: Callable[[MoeLayer], str | None]
    lower: LowerLogits
    lower_chosen: LowerChosen


MOE = Lowering(moe.NAME, moe.min_onnxruntime, moe.refusal, moe.lower, moe.lower_chosen)
QMOE = Lowering(qmoe.NAME, qmoe.min_onnxruntime, qmoe.refusal, qmoe.lower, qmoe.lower_chosen)
GROUPED = Lowering(grouped.NAME, grouped.min_onnxruntime, grouped.refusal, grouped.lower, grouped.lower_chosen)
UNROLLED = Lowering(unrolled.NAME, unrolled.min_onnxruntime, unrolled.refusal, unrolled.lower, unrolled.lower_chosen)


SWITCHED = Lowering(switched.NAME, switched.min_onnxruntime, switched.refusal, switched.lower, switched.lower_chosen)


def find_lowerings(layer: MoeLayer, wish: LoweringWish, runtime: str = ort.__version__) -> tuple[Lowering, ...]:
    """The lowerings that fit the wish and can express the layer.

    Where the wish is `switched`, that is `grouped` for experts that are no integers. Where it is `auto`, those are all
    that onnxruntime `runtime` computes rightly, in one form each: they are to be timed on it. A lowering asked for by
    its name may need a newer one, and its file says so.

    Raises:
        ExportError: none can.
    """
    fused = QMOE if layer.quantized else MOE
    every = (fused, GROUPED, UNROLLED)
    by_length = SWITCHED if layer.quantized and not layer.static else GROUPED
    known = tuple(lowering for lowering in every if Version(lowering.min_onnxruntime(layer)) <= Version(runtime))
    wished = {
        "auto": known,
        "fused": (fused,),
        "grouped": (GROUPED,),
        "unrolled": (UNROLLED,),
        "switched": (by_length,),
    }[wish]
    found = tuple(lowering for lowering in wished if lowering.refusal(layer) is None)
    if found:
        return found
    reasons = "; ".join(f"{lowering.name}: {lowering.refusal(layer)}" for lowering in wished)
    remedy = "use 'auto'" if any(lowering.refusal(layer) is None for lowering in every) else "no lowering can"
    raise ExportError(f"export.lowering '{wish}' cannot express {layer.name} ({reasons}); {remedy}")


def find_common_lowerings(
    layers: Sequence[MoeLayer], wish: LoweringWish, runtime: str = ort.__version__
) -> tuple[Lowering, ...]:
    """Lowerings that fit the wish and can express all these layers.

    `layers` has one layer at least; see `find_lowerings`.

    Raises:
        ExportError: none can.
    """
    first, *others = [find_lowerings(layer, wish, runtime) for layer in layers]
    common = tuple(lowering for lowering in first if all(lowering in found for found in others))
    if not common:
        raise ExportError(
            f"export.lowering '{wish}' cannot express layers with quantized experts beside layers without; use 'auto'"
        )
    return common
