"""GPTQ: integers chosen column by column, each column's error made good by those after it.

The loss of a matrix W [N, K] on inputs X [T, K] is |X W' - X Q'|², which depends on X through H = X'X alone. Rounding column j leaves an error that
the columns not yet rounded can make up for best by the inverse of H among themselves; its Cholesky factor holds all those inverses at once (Frantar
et al., GPTQ, 2023, sections 3.2 and 3.3). Columns are taken in their order; a block's scale is searched when its first column comes, on the weights
as they then are, with the squared error of each column weighted by its H_jj.

What is found so is improved by coordinate descent: in turn each scale, and each column's integers, take the values that are best for all others as
they are (as in QuantEase, Behdin et al., 2023, section 3). No step can raise the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from export.aim import damp
from export.quantization import Quantized, cut, encode, num_blocks, round_to, search_scales

_LAZY_COLUMNS = 128
"""Columns whose errors reach the later ones together; every block size divides it."""
_PASSES = 3
"""Of coordinate descent: of what ten passes gain over GPTQ's integers (a tenth of the loss, stories260k upcycled, 4 bits), three gain nine tenths."""


@dataclass(frozen=True)
class Moments:
    """What GPTQ needs to know of the inputs of matrices, padded to whole blocks: damped X'X, the factor of its inverse, X'X's own diagonal."""

    damped: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor
    width: int


def prepare_moments(hessian: torch.Tensor, block_size: int) -> Moments:
    """The moments X'X [K, K] of matrices that are to be quantized in blocks of `block_size`, factored once for all of them.

    An input that is always zero bears on nothing: its column is rounded, and has no error to pass on.

    Raises:
        ValueError: they are not finite, or not square.
    """
    width = hessian.shape[-1]
    if hessian.shape != (width, width) or not torch.isfinite(hessian).all():
        raise ValueError(f"moments {tuple(hessian.shape)} must be square and finite")
    padded = num_blocks(width, block_size) * block_size
    h, importance = torch.eye(padded), torch.zeros(padded)
    h[:width, :width] = damp(hessian)
    importance[:width] = hessian.diagonal()
    return Moments(h, _inverse_factor(h), importance, width)


def quantize_gptq(
    weight: torch.Tensor, moments: Moments, bits: int, block_size: int, scale_type: torch.dtype = torch.float32, zero_points: bool = False,
    passes: int = _PASSES,
) -> Quantized:  # fmt: skip
    """Quantize a weight [N, K] for inputs of these moments, to `bits` in blocks of `block_size`, maybe with zero points.

    `passes` of coordinate descent follow GPTQ's own.

    Raises:
        ValueError: the weight is no matrix of finite values, or does not fit the moments.
    """
    rows, width = weight.shape
    if moments.width != width or not torch.isfinite(weight).all():
        raise ValueError(f"weight {tuple(weight.shape)} must be finite, and {moments.width} wide as its moments")
    h, factor, importance = moments.damped, moments.factor, moments.importance
    blocked = cut(weight, block_size)
    target, w = blocked.flatten(1), blocked.flatten(1).clone()
    padded, blocks = len(h), blocked.shape[1]
    integers, scales, zeros = torch.zeros(rows, padded), torch.zeros(rows, blocks, 1), torch.zeros(rows, blocks, 1)
    scale = unit = zero = torch.zeros(rows, 1)
    for start in range(0, padded, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, padded)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            if column % block_size == 0:
                block = slice(column, column + block_size)
                found = search_scales(w[:, None, block], bits, importance[None, block], scale_type, zero_points)
                scale, unit, zero = (value[:, 0] for value in found)
                scales[:, column // block_size], zeros[:, column // block_size] = scale * unit, zero
            rounded = round_to(w[:, column : column + 1] / unit, scale, zero, bits)
            integers[:, column] = rounded[:, 0]
            error = (w[:, column : column + 1] - rounded * scale * unit) / factor[column, column]
            w[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error[:, 0]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    row_unit = torch.ldexp(
        torch.ones(rows, 1), torch.frexp(target.abs().amax(1, keepdim=True)).exponent - 1
    )  # no square overflows, and none vanishes
    for _ in range(passes):
        _descend(target, h, integers, scales, zeros, row_unit, bits, scale_type)
    return encode(integers.view(rows, blocks, block_size), scales, zeros, bits, zero_points)


def _descend(
    w: torch.Tensor, h: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, unit: torch.Tensor, bits: int,
    scale_type: torch.dtype,
) -> None:  # fmt: skip
    """One pass over all scales [N, blocks, 1] and then all columns of integers [N, K], both changed in place, for weights w and damped moments h.

    It computes in each row's `unit` [N, 1], a power of two. A value that is not finite there, as beside a scale that is none, is not taken.
    """
    rows, padded = w.shape
    block_size = padded // scales.shape[1]
    own_scales = scales[..., 0] / unit
    slope = (w / unit - integers * own_scales.repeat_interleave(block_size, 1)) @ h  # the loss falls by twice this when a dequantized weight rises
    for number in range(scales.shape[1]):
        block = slice(number * block_size, (number + 1) * block_size)
        own = integers[:, block]
        bent = own @ h[block]
        square = (bent[:, block] * own).sum(1)
        step = torch.where(square > 0, (slope[:, block] * own).sum(1) / square.clamp(min=1e-30), torch.zeros(()))
        old = own_scales[:, number]
        best = ((old + step) * unit[:, 0]).to(scale_type).to(torch.float32) / unit[:, 0]
        best = torch.where(torch.isfinite(best), best, old)
        slope -= (best - old)[:, None] * bent
        own_scales[:, number] = best
    scales[..., 0] = torch.where(torch.isfinite(own_scales), own_scales * unit, scales[..., 0])
    for start in range(0, padded, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, padded)
        near, moved = slope[:, start:stop].clone(), torch.zeros(rows, stop - start)
        for column in range(start, stop):
            scale, zero = own_scales[:, column // block_size, None], zeros[:, column // block_size]
            own = integers[:, column : column + 1]
            best = round_to(own * scale + near[:, column - start, None] / h[column, column], scale, zero, bits)
            best = torch.where(torch.isfinite(best), best, own)
            moved[:, column - start] = ((best - own) * scale)[:, 0]
            integers[:, column] = best[:, 0]
            near -= moved[:, column - start, None] * h[column, start:stop]
        slope -= moved @ h[start:stop]


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped H, float32 [K, K]; an input that is always zero stands alone in it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
