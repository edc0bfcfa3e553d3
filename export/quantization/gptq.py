"""GPTQ: integers column by column, later columns correct earlier errors.

The loss of a matrix W [N, K] on inputs X [T, K] is |X W' - X Q'|², which depends on X through H = X'X alone. Rounding
column j leaves an error that the columns not yet rounded can make up for best by the inverse of H among themselves; its
Cholesky factor holds all those inverses at once (Frantar et al., GPTQ, 2023, sections 3.2 and 3.3). Columns are taken
in their order; a block's scale is searched when its first column comes, on the weights as they then are, with the
squared error of each column weighted by its H_jj.

What is found so is improved by coordinate descent: block by block the scale, and then each column's integers, take the
values that are best for all others as they are (as in QuantEase, Behdin et al., 2023, section 3). No step can raise the
loss.

The work is one loop over columns, and each of its steps is short, so its speed is that of memory and of calls into
torch:

    layout     matrices lie transposed, [K, M, N]: a column of all rows of M matrices is one run of memory, and one call
               serves them all
    blocks     a column's change reaches its own block at once, the rest of 128 columns at the block's end, all others
               by a matrix product
    no upkeep  descent keeps what is left of the weights, W - Q, and takes the slope of 128 columns from it when they
               come, by one product

So nothing but products is larger than a core's cache, and the short steps use one core, which costs little where
another process has the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dense2moe.export.quantization.aim import damp
from dense2moe.export.quantization.blockwise import (
    Quantized,
    cut,
    default_zero_point,
    encode,
    join,
    num_blocks,
    search_scales,
)

_LAZY_COLUMNS = 128
"""Columns whose changes reach the others together; every block size divides it."""
_PASSES = 3
"""Of coordinate descent.

Of what ten passes gain over GPTQ's integers (a tenth of the loss, stories260k upcycled, 4 bits), three gain nine
tenths.
"""
_LANES = 8192
"""Rows that are quantized side by side.

A block of their columns fits into a core's cache, and a step takes longer than its call.
"""


@dataclass(frozen=True)
class InputMoments:
    """Second moments of matrix inputs for GPTQ, padded to whole blocks.

    Damped X'X, the factor of its inverse, X'X's own diagonal.
    """

    damped: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor
    width: int


def prepare_moments(hessian: torch.Tensor, block_size: int) -> InputMoments:
    """Moments X'X [K, K] of matrices to be quantized.

    The matrices are quantized in blocks of `block_size`. Factored once for all of them. An input that is always zero
    bears on nothing: its column is rounded, and has no error to pass on.

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
    return InputMoments(h, _inverse_factor(h), importance, width)


def quantize_gptq(
    weight: torch.Tensor,
    moments: InputMoments,
    bits: int,
    block_size: int,
    scale_type: torch.dtype = torch.float32,
    zero_points: bool = False,
    passes: int = _PASSES,
) -> Quantized:
    """Quantize a weight [N, K] for inputs of these moments.

    The result has `bits` bits, in blocks of `block_size`.

    Maybe with zero points.
    `passes` of coordinate descent follow GPTQ's own.

    Raises:
        ValueError: the weight is no matrix of finite values, or does not fit the moments.
    """
    return quantize_together([weight], [moments], bits, block_size, scale_type, zero_points, passes)[0]


def quantize_together(
    weights: Sequence[torch.Tensor],
    moments: Sequence[InputMoments],
    bits: int,
    block_size: int,
    scale_type: torch.dtype = torch.float32,
    zero_points: bool = False,
    passes: int = _PASSES,
) -> list[Quantized]:
    """Quantize weights of one shape [N, K] side by side.

    Each weight has its own moments. Many small ones take little longer.

    Raises:
        ValueError: a weight is no matrix of finite values, or does not fit its moments.
    """
    for weight, own in zip(weights, moments, strict=True):
        if own.width != weight.shape[-1] or not torch.isfinite(weight).all():
            raise ValueError(f"weight {tuple(weight.shape)} must be finite, and {own.width} wide as its moments")
    found = []
    for batch, rows in _share_lanes(len(weights), len(weights[0])):
        part = _Lanes(
            [weight[rows] for weight in weights[batch]], moments[batch], bits, block_size, scale_type, zero_points
        )
        part.round_columns()
        for _ in range(passes):
            part.descend()
        found.append((batch, part.encode()))
    return [
        join([parts[place - batch.start] for batch, parts in found if batch.start <= place < batch.stop])
        for place in range(len(weights))
    ]


def _share_lanes(count: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Groups of matrices and rows that are quantized side by side.

    There are `count` matrices in all.
    """
    together = max(1, _LANES // rows)
    for first in range(0, count, together):
        for start in range(0, rows, _LANES):
            yield slice(first, min(first + together, count)), slice(start, start + _LANES)


class _Lanes:
    """Rows of M matrices being quantized; tensors have columns first.

    [K, M, N], or [blocks, M, N] where a block shares a value. integers, scales and zeros are what is looked for. `left`
    is what is still to be rounded while columns are rounded, then W - Q in each row's `unit` [M, N], a power of two
    near its largest weight, so that no square overflows, and none vanishes.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        moments: Sequence[InputMoments],
        bits: int,
        block_size: int,
        scale_type: torch.dtype,
        zero_points: bool,
    ) -> None:
        self.bits, self.block_size, self.scale_type, self.zero_points = bits, block_size, scale_type, zero_points
        self.moments = moments
        self.target = torch.stack([cut(weight, block_size).flatten(1).t() for weight in weights], 1)
        self.left = self.target.clone()
        self.integers = torch.zeros_like(self.target)
        self.scales = self.target.new_zeros(len(self.target) // block_size, *self.target.shape[1:])
        self.zeros = torch.full_like(self.scales, default_zero_point(bits))
        self.lowest, self.highest = -default_zero_point(bits), default_zero_point(bits) - 1

    def _chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Columns whose changes are propagated together, and their blocks."""
        for start in range(0, len(self.target), _LAZY_COLUMNS):
            stop = min(start + _LAZY_COLUMNS, len(self.target))
            yield (
                slice(start, stop),
                [slice(first, first + self.block_size) for first in range(start, stop, self.block_size)],
            )

    def _round(self, x: torch.Tensor, number: int) -> None:
        """Round x [M, N] to integers that block `number`'s codes hold."""
        x.round_()
        if self.zero_points:
            zero = self.zeros[number]
            torch.clamp(x, -zero, ((1 << self.bits) - 1) - zero, out=x)
        else:
            x.clamp_(self.lowest, self.highest)

    def round_columns(self) -> None:
        """GPTQ's own pass."""
        left, size = self.left, self.block_size
        factors = [own.factor for own in self.moments]
        rows = torch.stack(factors, 1)[..., None]  # [K, M, K, 1]
        for chunk, blocks in self._chunks():
            errors = torch.empty_like(left[chunk])
            for block in blocks:
                done = slice(chunk.start, block.start)
                _subtract_products(
                    left[block], [factor[done, block].t() for factor in factors], errors[: block.start - chunk.start]
                )
                number = block.start // size
                scale, unit = self._search(block, number)
                full = self.scales[number] = scale * unit
                inverse = torch.where(scale == 0, torch.zeros(()), 1 / scale)
                for column in range(block.start, block.stop):
                    rounded, error = self.integers[column], errors[column - chunk.start]
                    self._round(torch.div(left[column], unit, out=rounded).mul_(inverse), number)
                    torch.addcmul(left[column], rounded, full, value=-1, out=error)
                    error /= rows[column, :, column]
                    if column + 1 < block.stop:
                        later = slice(column + 1, block.stop)
                        left[later].addcmul_(rows[column, :, later].transpose(0, 1), error, value=-1)
            later = slice(chunk.stop, None)
            _subtract_products(left[later], [factor[chunk, later].t() for factor in factors], errors)
        self._start_descent()

    def _search(self, block: slice, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's scale and its unit, [M, N]; zero points are kept."""
        importance = torch.stack([own.importance[block] for own in self.moments])
        found = search_scales(
            self.left[block].permute(2, 1, 0).contiguous(), self.bits, importance, self.scale_type, self.zero_points
        )
        scale, unit, zero = (value[..., 0].t().contiguous() for value in found)
        self.zeros[number] = zero
        return scale, unit

    def _start_descent(self) -> None:
        """Turn `left` from unrounded values into W - Q."""
        self.unit = _power_below(self.target.abs().amax(0))
        own = self.scales / self.unit
        # a scale beyond its type's range is left as it is
        self.own = torch.where(torch.isfinite(own), own, torch.zeros(()))
        torch.div(self.target, self.unit, out=self.left).addcmul_(
            self.integers, self.own.repeat_interleave(self.block_size, 0), value=-1
        )

    def descend(self) -> None:
        """Set each block's scale, then its columns' integers, to the best values.

        Meanwhile all others are fixed.
        """
        for block, near, h in self._visit():
            self._refit_scale(block, near, h)
            self._descend(block, near, h)

    def _refit_scale(self, block: slice, near: torch.Tensor, h: list[torch.Tensor]) -> None:
        number = block.start // self.block_size
        integers, old = self.integers[block], self.own[number]
        bent = torch.stack([square @ integers[:, m] for m, square in enumerate(h)], 1)
        square = (bent * integers).sum(0)
        step = torch.where(square > 0, (near * integers).sum(0) / square.clamp(min=1e-30), torch.zeros(()))
        best = ((old + step) * self.unit).to(self.scale_type).to(torch.float32) / self.unit
        change = torch.where(torch.isfinite(best), best - old, torch.zeros(()))
        self.left[block].addcmul_(integers, change, value=-1)
        near.addcmul_(bent, change, value=-1)
        self.own[number] += change

    def _descend(self, block: slice, near: torch.Tensor, h: list[torch.Tensor]) -> None:
        number = block.start // self.block_size
        # rows: [block, M, block, 1]
        scale, rows, before = self.own[number], torch.stack(h, 1)[..., None], self.integers[block].clone()
        inverse = torch.where(scale == 0, torch.zeros(()), 1 / scale)
        for place in range(self.block_size):
            best, own = near[place], self.integers[block.start + place]
            best /= rows[place, :, place]
            self._round(best.addcmul_(own, scale).mul_(inverse), number)
            moved = (best - own).mul_(scale)
            own.copy_(best)
            self.left[block.start + place] -= moved
            near[place + 1 :].addcmul_(rows[place, :, place + 1 :].transpose(0, 1), moved, value=-1)
        chosen = self.integers[block]
        torch.where(torch.isfinite(chosen), chosen, before, out=chosen)

    def _visit(self) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """Visit block by block, while `left` changes.

        Half of the slope by which the loss falls as weights of it rise, [block, M, N], and its moments.
        """
        damped = [own.damped for own in self.moments]
        for chunk, blocks in self._chunks():
            slope, before = (
                torch.stack([h[chunk] @ self.left[:, m] for m, h in enumerate(damped)], 1),
                self.left[chunk].clone(),
            )
            for block in blocks:
                done, near = (
                    slice(chunk.start, block.start),
                    slope[block.start - chunk.start : block.stop - chunk.start],
                )
                moved = before[: block.start - chunk.start] - self.left[done]
                _subtract_products(near, [h[block, done] for h in damped], moved)
                yield block, near, [h[block, block] for h in damped]

    def encode(self) -> list[Quantized]:
        """Each matrix's result."""
        blocks, found = len(self.scales), []
        scales = torch.where(torch.isfinite(self.scales), self.own * self.unit, self.scales)
        for m in range(len(self.moments)):
            integers, own, zeros = (value[:, m].t().contiguous() for value in (self.integers, scales, self.zeros))
            found.append(
                encode(
                    integers.unflatten(1, (blocks, self.block_size)),
                    own[..., None],
                    zeros[..., None],
                    self.bits,
                    self.zero_points,
                )
            )
        return found


def _subtract_products(values: torch.Tensor, factors: Sequence[torch.Tensor], changes: torch.Tensor) -> None:
    """Subtract factor [n, k] times changes [k, M, N] from values.

    Values are [n, M, N]; each matrix has its own factor.
    """
    if len(changes) and len(values):
        for m, factor in enumerate(factors):
            values[:, m] -= factor @ changes[:, m]


def _inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped H's inverse, float32 [K, K].

    An input that is always zero stands alone in it. With rows and columns reversed H = L L', so H = R R' of an upper R,
    and the inverse is (R⁻¹)' R⁻¹: one factor, and one inverse of a triangle.
    """
    return _invert_triangle(torch.linalg.cholesky(damped.double().flip(0, 1)).flip(0, 1)).float()


def _invert_triangle(upper: torch.Tensor) -> torch.Tensor:
    """The inverse of an upper triangle [K, K], by halves.

    It takes a third of the products that solving for the identity takes.

    Of [[A, B], [0, D]] it is [[A⁻¹, -A⁻¹ B D⁻¹], [0, D⁻¹]].
    """
    width, half = len(upper), len(upper) // 2
    if width <= _LAZY_COLUMNS:
        solved: torch.Tensor = torch.linalg.solve_triangular(upper, torch.eye(width, dtype=upper.dtype), upper=True)
        return solved
    inverse, first, last = torch.zeros_like(upper), slice(half), slice(half, None)
    inverse[first, first], inverse[last, last] = (
        _invert_triangle(upper[first, first]),
        _invert_triangle(upper[last, last]),
    )
    inverse[first, last] = -(inverse[first, first] @ upper[first, last] @ inverse[last, last])
    return inverse


def _power_below(sizes: torch.Tensor) -> torch.Tensor:
    """The largest power of two not above each size; 1/2 for zero."""
    return torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent - 1)
