"""Input scales (AWQ, SmoothQuant), folded into norms and matrices.

A matrix W that reads x computes the same with W diag(s) on x / s, and a weight in a large channel of x, made larger by
s, has a smaller relative error when it is rounded (AWQ, Lin et al., 2023, section 3.2). The operators that read x in 8
bits round it too, by the largest of each block of channels, and there x / s has blocks of like sizes (SmoothQuant, Xiao
et al., 2023, section 4). 'awq' weighs what rounding the weights costs, 'smooth' both. s is the mean or, for 'smooth',
the largest of |x| to a power, the one with the smallest error of the outputs, 0 (nothing scaled) among those tried. The
error is measured for inputs, on some tokens, and for weights it is that of an even error within each block's step.

What divides x is folded into what makes it, and costs nothing when the model runs:

- query, key and value: the norm before them;
- attention's output: the rows of value, and its bias; heads that share a value share s;
- the first matrices of all experts, of a shared one, and of a dense FFN: the norm before them, and so the router and
  the shared expert's gate are multiplied as well;
- the last matrix of an FFN: the rows of its up, and their bias, where what it reads is proportional to what up gives:
  behind a gate, or a ReLU;
- an output head that is not the embedding: the final norm; of one that is the embedding too, nothing makes only its
  input, so the graph divides what it reads, and the rows of the embedding, by s (`dense2moe.export.nodes.linear`,
  `dense2moe.export.nodes.embedding`).

Where no norm lies just before (those of OLMo 2 come after the block), or another activation without a gate, there is
nothing to fold into, and the matrices stay. The result is a plain checkpoint of the same architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch

from dense2moe.export.quantization.blockwise import is_quantized
from dense2moe.export.quantization.calibration import CalibrationWalk, Group
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.inputs import Scaled
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import bias_name

# and then those between the best and its neighbours: errors are smooth in them
_POWERS = tuple(step / 10 for step in range(2, 11, 2))
_FINE_STEP = 0.1
_MIN_SCALE = 1e-4
READ_TOKENS = 4096
"""Tokens whose sizes of channels are measured."""
_SAMPLE_TOKENS = 256
"""Tokens whose rounding is measured."""
_GPTQ_SHARE = 0.3
"""What GPTQ leaves of the error of searched scales, about.

4.6e-3 of 1.6e-2 nats on the embedded model's mixture (docs/results/quantization.md).
"""
_LARGEST_INTEGER = 127


@dataclass
class ScalingRecord:
    """Counts of input scaling, by groups of matrices.

    Matrices of a group read the same input. Those that were scaled, those that are best as they are, those that have
    nothing to fold into.
    """

    num_scaled: int = 0
    num_best_unscaled: int = 0
    num_without_place: int = 0

    def add(self, other: ScalingRecord) -> None:
        """Add another layer's counts."""
        self.num_scaled += other.num_scaled
        self.num_best_unscaled += other.num_best_unscaled
        self.num_without_place += other.num_without_place


@dataclass
class ScaledLayer:
    """Changed tensors of one layer, float32; its function stays.

    Tensors are keyed by name.
    """

    walk: CalibrationWalk
    layer: int
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def multiply_inputs(self, matrices: Iterable[tuple[str, tuple[int, int] | None]], scales: torch.Tensor) -> None:
        """Multiply columns of matrices by scales [K].

        Of some matrices only certain rows.
        """
        for name, rows in matrices:
            flat = self._take(name).flatten(0, -2)  # a view
            flat[slice(*rows) if rows else slice(None)] *= scales

    def divide_outputs(self, name: str, rows: tuple[int, int], scales: torch.Tensor) -> None:
        """Divide rows of a matrix, or a vector, by scales [rows]."""
        tensor = self._take(name)
        flat = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[:, None]
        flat[slice(*rows)] /= scales[:, None]

    def divide_elements(self, name: str, elements: tuple[int, int], scales: torch.Tensor) -> None:
        """Divide elements of a bias, or of stacked ones, by scales [elements]."""
        self._take(name).flatten()[slice(*elements)] /= scales

    def _take(self, name: str) -> torch.Tensor:
        if name not in self.changed:
            self.changed[name] = self.walk.checkpoint.read(name).to(torch.float32, copy=True).contiguous()
        return self.changed[name]


def scale_layer(
    walk: CalibrationWalk, layer: int, plan: Mapping[str, int], config: QuantizeConfig, record: ScalingRecord
) -> Scaled:
    """Changed tensors of the next layer.

    `plan` has the bits of every tensor.

    Counts groups in `record`.
    """
    scaled = ScaledLayer(walk, layer)
    family = walk.family
    first, num_first = [], 0
    for group in walk.read_float(layer, READ_TOKENS):
        num_first += group.place == "first"
        if not all(is_quantized(plan[name]) for name, _ in group.matrices):
            continue
        if group.place == "first":
            first.append(group)  # the norm before them is one
            continue
        if not _has_place(group, walk):
            record.num_without_place += 1
            continue
        scales = choose_scales([group], walk, plan, config, record)
        if scales is not None:
            fold(scaled, family, [group], scales)
    if first and family.find("ffn_norm") is None:
        record.num_without_place += 1
    elif first and len(first) == num_first:  # else the norm has readers that are not quantized
        scales = choose_scales(first, walk, plan, config, record)
        if scales is not None:
            fold(scaled, family, first, scales)
    return Scaled(scaled.changed, scaled.scales)


def _has_place(group: Group, walk: CalibrationWalk) -> bool:
    """Whether something that makes a group's input can be divided for it."""
    if group.place == "attention":
        return walk.family.find("attention_norm") is not None
    return group.ffn is None or group.ffn.is_gated or walk.checkpoint.config.hidden_act == "relu"


def fold(scaled: ScaledLayer, family: Architecture, groups: Sequence[Group], scales: torch.Tensor) -> None:
    """Multiply readers' columns by scales [K], and divide their input's maker.

    The readers share one input. `groups` is one group, or all the first matrices of a layer's FFNs.
    """
    layer, config = scaled.layer, scaled.walk.checkpoint.config
    for group in groups:
        scaled.multiply_inputs(group.matrices, scales)
    group = groups[0]
    scaled.scales[group.place] = scales
    match group.place:
        case "attention":
            scaled.divide_outputs(family.name("attention_norm", layer), (0, len(scales)), scales)
        case "output":
            heads = config.num_key_value_heads
            own = scales.view(heads, config.num_attention_heads // heads, -1)[:, 0].flatten()
            value = family.name("value", layer)
            for name in (value, bias_name(value)):
                if name in scaled.walk.checkpoint.entries:
                    scaled.divide_outputs(name, (0, len(own)), own)
        case "first":
            scaled.divide_outputs(family.name("ffn_norm", layer), (0, len(scales)), scales)
            shift = family.find("ffn_norm_bias", layer)
            if shift is not None and shift in scaled.walk.checkpoint.entries:
                scaled.divide_elements(shift, (0, len(scales)), scales)
            others = (family.find("router", layer), family.find("shared_scale", layer))
            readers = [(name, None) for name in others if name is not None and name in scaled.walk.checkpoint.entries]
            scaled.multiply_inputs(readers, scales)
        case "last":
            assert group.ffn is not None
            scaled.divide_outputs(*group.ffn.up, scales)
            if group.ffn.up_bias is not None:
                scaled.divide_elements(*group.ffn.up_bias, scales)
        case "head":
            raise AssertionError("the head is in no layer; it folds into the final norm")
        case _:
            assert_never(group.place)


def choose_scales(
    groups: Sequence[Group],
    walk: CalibrationWalk,
    plan: Mapping[str, int],
    config: QuantizeConfig,
    record: ScalingRecord,
    extra_importance: float = 0.0,
) -> torch.Tensor | None:
    """Input scales [K] with the smallest error of the outputs.

    None where that is with nothing scaled. Counts in `record`.

    `extra_importance`: what the square of each weight's own error counts, in mean squares of an input, beside its share
    of the outputs.
    """
    parts = [part for group in groups if (part := _Part.of(group, walk)) is not None]
    if not parts:
        record.num_best_unscaled += 1
        return None

    def estimate(scales: torch.Tensor) -> float:
        return sum(part.estimate(scales, plan, config, extra_importance) for part in parts)

    best, least = None, estimate(torch.ones_like(parts[0].squares))
    for sizes in _channel_sizes(groups[0], parts, walk, config):
        errors = {power: estimate(_scales(sizes, power)) for power in _POWERS}
        middle = min(errors, key=errors.__getitem__)
        errors |= {
            power: estimate(_scales(sizes, power))
            for power in (middle - _FINE_STEP, middle + _FINE_STEP)
            if power <= _POWERS[-1]
        }
        power = min(errors, key=errors.__getitem__)
        if errors[power] < least:
            best, least = _scales(sizes, power), errors[power]
    if best is None:
        record.num_best_unscaled += 1
    else:
        record.num_scaled += 1
    return best


@dataclass(frozen=True)
class _Part:
    """One group and its input x.

    matrices: [N, K] each, with the name of the tensor that it is in. below: all of them below each other, or, where it
    has fewer elements, the gram matrix [K, K], the sum of W'W. sample: some tokens [S, K] of the `num_tokens` that are
    read; total, largest, squares: by channel [K] the sum of |x|, the largest |x| and the sum of x², over all tokens.
    """

    matrices: tuple[tuple[str, torch.Tensor], ...]
    below: torch.Tensor
    is_gram: bool
    sample: torch.Tensor
    num_tokens: int
    total: torch.Tensor
    largest: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, group: Group, walk: CalibrationWalk) -> _Part | None:
        """The part of a group; None where it reads no token."""
        inputs = group.read().actual
        if not len(inputs):
            return None
        matrices = tuple((name, walk.read_matrix(name, rows)) for name, rows in group.matrices)
        below = torch.cat([weight for _, weight in matrices])
        is_gram = below.shape[0] > below.shape[1]
        sample = inputs[:: max(1, len(inputs) // _SAMPLE_TOKENS)][:_SAMPLE_TOKENS]
        magnitudes = inputs.abs()
        return cls(
            matrices,
            below.T @ below if is_gram else below,
            is_gram,
            sample,
            len(inputs),
            magnitudes.sum(0),
            magnitudes.amax(0),
            inputs.square().sum(0),
        )

    def estimate(
        self, scales: torch.Tensor, plan: Mapping[str, int], config: QuantizeConfig, extra_importance: float
    ) -> float:
        """Squared error of outputs with these scales, over all tokens.

        It is the error that rounding leaves.
        """
        squares = self.squares + extra_importance * self.squares.mean()
        importance = _by_block(squares / scales.square(), config.block_size).sum(-1)
        error = 0.0
        for name, weight in self.matrices:
            step = _by_block(weight * scales, config.block_size).abs().amax(-1) / ((1 << (plan[name] - 1)) - 1)
            left = _GPTQ_SHARE if config.method_of(plan[name]) == "gptq" else 1.0
            # the variance of an error that is even within a step
            error += left * float((step.square().sum(0) * importance).sum()) / 12
        if config.input_scaling == "smooth":
            lost = round_inputs(self.sample / scales, config.block_size) * scales - self.sample
            outputs = (lost @ self.below).mul_(lost) if self.is_gram else (lost @ self.below.T).square_()
            error += float(outputs.sum()) * self.num_tokens / len(self.sample)
        return error


def round_inputs(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x [..., K] rounded as operators with 8-bit activations round it.

    Integers from -127 to 127 times a scale for each block of a token. Measured to the bit of float32 on onnxruntime's
    CPU (`MatMulNBits` at accuracy_level 4, `QMoE`): the scale is the block's largest magnitude / 127.
    """
    blocks = _by_block(x, block_size)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = largest / _LARGEST_INTEGER
    inverse = torch.where(largest > 0, _LARGEST_INTEGER / largest, torch.zeros(()))
    return ((blocks * inverse).round() * scale).flatten(-2)[..., : x.shape[-1]]


def _by_block(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x [..., K] as [..., blocks, block_size], padded with zeros."""
    padded: torch.Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size))
    return padded.view(*x.shape[:-1], padded.shape[-1] // block_size, block_size)  # of no rows, -1 could be anything


def _channel_sizes(
    group: Group, parts: Sequence[_Part], walk: CalibrationWalk, config: QuantizeConfig
) -> Iterator[torch.Tensor]:
    """Channel sizes: mean |x| [K], and the largest where needed.

    The largest is needed where inputs are rounded too.
    """
    yield _share_by_head(
        sum((part.total for part in parts), torch.zeros(())) / sum(part.num_tokens for part in parts), group, walk
    )
    if config.input_scaling == "smooth":
        yield _share_by_head(torch.stack([part.largest for part in parts]).amax(0), group, walk)


def _share_by_head(sizes: torch.Tensor, group: Group, walk: CalibrationWalk) -> torch.Tensor:
    """Attention's output: mean over the heads that share a value."""
    if group.place != "output":
        return sizes
    heads = walk.checkpoint.config.num_key_value_heads
    by_head = sizes.view(heads, walk.checkpoint.config.num_attention_heads // heads, -1)
    return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()


def _scales(sizes: torch.Tensor, power: float) -> torch.Tensor:
    """Channel sizes [K] to a power, with geometric centre 1.

    With one between the largest and the smallest.

    A size of zero counts as the smallest other.
    """
    if not bool((sizes > 0).any()):
        return torch.ones_like(sizes)
    scales = sizes.clamp(min=float(sizes[sizes > 0].min())) ** power
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(min=_MIN_SCALE, max=1 / _MIN_SCALE)
