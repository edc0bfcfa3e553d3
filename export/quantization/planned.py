"""Weights that are yet to be quantized, as lowerings see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dense2moe.export.quantization.bits import class_bits
from dense2moe.export.quantization.blockwise import is_quantized
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.twin import FloatWeight, QuantizedWeight, Weight
from dense2moe.export.variant import STATIC, Device, Variant
from dense2moe.upcycle.checkpoints.tensors import TensorEntry


@dataclass(frozen=True)
class PlannedTwin:
    """A twin of names, shapes and one width in bits.

    It answers what a `Twin` does of its tensors; there is nothing to be read.
    """

    shapes: Mapping[str, tuple[int, ...]]
    variant: Variant
    config: QuantizeConfig
    bits: int

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor's entry, which lies in no file."""
        return {
            name: TensorEntry(name, Path(), "F32", shape, 0, 4 * math.prod(shape))
            for name, shape in self.shapes.items()
        }

    def weight(self, name: str, rows: tuple[int, int] | None = None) -> Weight:
        """A matrix or some of its rows; vectors are floats."""
        entry, shape = self.entries[name], self.shapes[name]
        if not is_quantized(self.bits) or len(shape) == 1:
            return FloatWeight(entry, rows)
        start, stop = rows or (0, math.prod(shape[:-1]))
        size = (stop - start, shape[-1])
        if self.variant == STATIC:
            return QuantizedWeight(entry, {}, size, self.bits, shape[-1], start, is_static=True)
        return QuantizedWeight(entry, {}, size, self.bits, self.config.block_size, start, self.config.zero_points)


def plan_expert_bits(variant: Variant, config: QuantizeConfig, device: Device) -> list[int]:
    """Every width that experts of a variant can have, the least first."""
    own = class_bits(variant, config, device)["experts"]
    raised = {max(own, each.bits) for each in config.overrides if each.tensors == "experts" and is_quantized(own)}
    return sorted({own} | raised | ({8} if variant == "mixed" else set()))
