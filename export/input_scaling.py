"""Inputs scaled so that the weights that matter most are rounded least, and the model computes what it did.

A matrix W that reads x computes the same with W diag(s) on x / s, and a weight in a large channel of x, made larger by s, has a smaller relative
error when it is rounded (AWQ, Lin et al., 2023, section 3.2). s is the mean of |x| to a power, the one with the smallest error of the outputs
when the matrices are rounded with searched scales, 0 (nothing scaled) among those tried. What divides x is folded into what makes it:

- query, key and value: the norm before them;
- attention's output: the rows of value, and its bias; heads that share a value share s;
- the first matrices of all experts, of a shared one, and of a dense FFN: the norm before them, and so the router and the shared expert's gate are
  multiplied as well;
- the last matrix of an FFN: the rows of its up;
- an output head that is not the embedding: the final norm.

Where no norm lies just before (those of OLMo 2 come after the block) there is nothing to fold into, and the matrices stay. The result is a plain
checkpoint of the same architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch

from export.calibration import CalibrationWalk, Group
from export.config import QuantizeConfig
from export.family import DecoderFamily, bias_name
from export.quantization import dequantize, is_quantized, quantize

_POWERS = tuple(step / 10 for step in range(11))
_MIN_SCALE = 1e-4


@dataclass
class ScalingRecord:
    """Groups of matrices with the same inputs: those that were scaled, those that are best as they are, those that have nothing to fold into."""

    num_scaled: int = 0
    num_best_unscaled: int = 0
    num_without_place: int = 0

    def add(self, other: ScalingRecord) -> None:
        """Take in the counts of another layer."""
        self.num_scaled += other.num_scaled
        self.num_best_unscaled += other.num_best_unscaled
        self.num_without_place += other.num_without_place


@dataclass
class ScaledLayer:
    """The tensors of one layer that are changed, by name, float32; the layer computes the same function with them."""

    walk: CalibrationWalk
    layer: int
    changed: dict[str, torch.Tensor] = field(default_factory=dict)

    def multiply_inputs(self, matrices: Iterable[tuple[str, tuple[int, int] | None]], scales: torch.Tensor) -> None:
        """Multiply the columns of matrices, or of some of their rows, by scales [K]."""
        for name, rows in matrices:
            flat = self._take(name).flatten(0, -2)  # a view
            flat[slice(*rows) if rows else slice(None)] *= scales

    def divide_outputs(self, name: str, rows: tuple[int, int], scales: torch.Tensor) -> None:
        """Divide some rows of a matrix, or elements of a vector, by scales [rows]."""
        tensor = self._take(name)
        flat = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[:, None]
        flat[slice(*rows)] /= scales[:, None]

    def _take(self, name: str) -> torch.Tensor:
        if name not in self.changed:
            self.changed[name] = self.walk.checkpoint.read(name).to(torch.float32, copy=True).contiguous()
        return self.changed[name]


def scale_layer(walk: CalibrationWalk, layer: int, plan: Mapping[str, int], config: QuantizeConfig, record: ScalingRecord) -> dict[str, torch.Tensor]:
    """The changed tensors of the layer that is next in the walk; `plan` has the bits of every tensor. Counts groups in `record`."""
    scaled = ScaledLayer(walk, layer)
    family = walk.family
    first, num_first = [], 0
    for group in walk.read_float(layer):
        num_first += group.place == "first"
        if not all(is_quantized(plan[name]) for name, _ in group.matrices):
            continue
        if group.place == "first":
            first.append(group)  # the norm before them is one
            continue
        if group.place == "attention" and family.attention_norm is None:
            record.num_without_place += 1
            continue
        scales = choose_scales([group], walk, plan, config, record)
        if scales is not None:
            fold(scaled, family, [group], scales)
    if first and family.ffn_norm is None:
        record.num_without_place += 1
    elif first and len(first) == num_first:  # else the norm has readers that are not quantized
        scales = choose_scales(first, walk, plan, config, record)
        if scales is not None:
            fold(scaled, family, first, scales)
    return scaled.changed


def fold(scaled: ScaledLayer, family: DecoderFamily, groups: Sequence[Group], scales: torch.Tensor) -> None:
    """Multiply the columns of all that read one input by scales [K], and divide what makes the input.

    `groups` is one group, or all the first matrices of a layer's FFNs.
    """
    layer, config = scaled.layer, scaled.walk.checkpoint.config
    for group in groups:
        scaled.multiply_inputs(group.matrices, scales)
    group = groups[0]
    match group.place:
        case "attention":
            assert family.attention_norm is not None
            scaled.divide_outputs(family.attention_norm.format(layer=layer), (0, len(scales)), scales)
        case "output":
            heads = config.num_key_value_heads
            own = scales.view(heads, config.num_attention_heads // heads, -1)[:, 0].flatten()
            value = family.attention.value.format(layer=layer)
            for name in (value, bias_name(value)):
                if name in scaled.walk.checkpoint.entries:
                    scaled.divide_outputs(name, (0, len(own)), own)
        case "first":
            assert family.ffn_norm is not None
            scaled.divide_outputs(family.ffn_norm.format(layer=layer), (0, len(scales)), scales)
            gate = family.shared.scale if family.shared is not None else None
            others = [name.format(layer=layer) for name in (family.router, gate) if name is not None]
            scaled.multiply_inputs([(name, None) for name in others if name in scaled.walk.checkpoint.entries], scales)
        case "last":
            assert group.up is not None
            name, rows = group.up
            scaled.divide_outputs(name, rows, scales)
        case "head":
            raise AssertionError("the head is in no layer; it folds into the final norm")
        case _:
            assert_never(group.place)


def choose_scales(
    groups: Sequence[Group], walk: CalibrationWalk, plan: Mapping[str, int], config: QuantizeConfig, record: ScalingRecord
) -> torch.Tensor | None:
    """Scales [K] of what matrices read, with the smallest error of their outputs; None where that is with nothing scaled. Counts in `record`."""
    moments, total, num_tokens = [], torch.zeros(()), 0
    for group in groups:
        inputs = group.read().actual
        total, num_tokens = total + inputs.abs().sum(0), num_tokens + len(inputs)
        moments.append(inputs.T @ inputs)
    if num_tokens == 0:
        record.num_best_unscaled += 1
        return None
    mean = total / num_tokens
    if groups[0].place == "output":
        heads = walk.checkpoint.config.num_key_value_heads
        by_head = mean.view(heads, walk.checkpoint.config.num_attention_heads // heads, -1)
        mean = by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
    errors, candidates = [], [_scales(mean, power) for power in _POWERS]
    for scales in candidates:
        error = 0.0
        for group, hessian in zip(groups, moments, strict=True):
            importance = hessian.diagonal() / scales.square()
            for name, rows in group.matrices:
                weight = walk.read_matrix(name, rows)
                found = quantize(weight * scales, plan[name], config.block_size, importance, zero_points=config.zero_points)
                difference = weight - dequantize(found, weight.shape[1], plan[name]) / scales
                error += float(((difference @ hessian) * difference).sum())
        errors.append(error)
    best = min(range(len(errors)), key=errors.__getitem__)
    if best == 0:
        record.num_best_unscaled += 1
        return None
    record.num_scaled += 1
    return candidates[best]


def _scales(mean: torch.Tensor, power: float) -> torch.Tensor:
    """The mean of |x| [K] to a power, with one between the largest and the smallest; a channel that is always zero is as the smallest that is not."""
    if not bool((mean > 0).any()):
        return torch.ones_like(mean)
    scales = mean.clamp(min=float(mean[mean > 0].min())) ** power
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(min=_MIN_SCALE, max=1 / _MIN_SCALE)
