"""Flips of a rounding, told apart from errors.

A number that lies between two integers of 8 bits may be rounded to either, by a sum in another order or a factor that
is rounded otherwise. What a product gives then differs by one step of its input times one column of its matrix. So a
difference that is a sum of such columns, each of an input that lies so near the middle, is flips; and one that is not
is an error, however small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from dense2moe.export.quantization.simulation import EightBits

NEAR_MIDDLE = {"given": (1e-6, 1e-6), "inner": (1e-3, 1e-5)}
"""In steps of 8 bits, and by the number itself.

What a number to be rounded may err by where it is known to the bit, and where it is computed.
"""
_MOST_FLIPS = 24
_MOST_MOVED = 3
_WHOLE_STEP = 1.01
"""A flip is one step, times the weight of the expert where it is inside of one."""
_ALIKE = 1e-3  # of the largest singular value: experts may be as good as copies, and their columns then are
_TINY = 1e-30
Round = Callable[[torch.Tensor], torch.Tensor]
Alone = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[list[torch.Tensor]]]]
"""Of rows [T, H] of inputs, and their numbers.

What an FFN makes of them, and what flips inside of it may add to each.
"""


class Inside(Protocol):
    """A part that rounds inside, and shows only its output."""

    def explain(
        self, rows: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, limit: float
    ) -> Iterator[tuple[int, float]]:
        """Rows beyond the limit that flips explain, with their remaining error.

        The remaining error is relative.

        Both float64 [rows, N].
        """


@dataclass(frozen=True)
class RoundedProduct:
    """One product with known inputs [T, K], its result times a factor."""

    given: torch.Tensor
    weight: torch.Tensor
    rounding: EightBits
    factor: float = 1.0

    def explain(
        self, rows: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, limit: float
    ) -> Iterator[tuple[int, float]]:
        """See `Inside`."""
        near = near_middle(self.given[rows], self.weight, self.rounding, "given") if len(rows) else []
        for row, difference, own, columns in zip(rows.tolist(), found - expected, expected, near, strict=True):
            error = _take_off(difference, [column * self.factor for column in columns], own)
            if error <= limit:
                yield row, error


@dataclass(frozen=True)
class RoundedFfn:
    """A gated FFN or experts with known inputs [T, H].

    Where a flip of one of these may have been, it is tried. `firsts` round them, one each for matrices that read them
    by scales of their own. What the place shows has `factor` times what `run` gives; `largest` is the largest weight
    that an expert's output may have in it.
    """

    given: torch.Tensor
    run: Alone
    firsts: tuple[EightBits, ...]
    factor: float = 1.0
    largest: float = 1.0

    def explain(
        self, rows: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, limit: float
    ) -> Iterator[tuple[int, float]]:
        """See `Inside`."""
        if not len(rows):
            return
        before, columns = self.run(self.given[rows], rows)
        left = []
        for number, (row, difference, own) in enumerate(zip(rows.tolist(), found - expected, expected, strict=True)):
            error = self._take_off(difference, columns[number], own)
            if error <= limit:
                yield row, error
            else:
                left.append(number)
        tried = [(number, other) for number in left for other in self._move(self.given[rows[number]])]
        if not tried:
            return
        numbers = torch.tensor([number for number, _ in tried])
        outputs, columns = self.run(torch.stack([other for _, other in tried]), rows[numbers])
        best: dict[int, float] = {}
        for number, output, own_columns in zip(numbers.tolist(), outputs, columns, strict=True):
            own = expected[number] + self.factor * (output.double() - before[number].double())
            best[number] = min(best.get(number, math.inf), self._take_off(found[number] - own, own_columns, own))
        yield from ((int(rows[number]), error) for number, error in best.items() if error <= limit)

    def _take_off(self, difference: torch.Tensor, columns: list[torch.Tensor], own: torch.Tensor) -> float:
        return _take_off(difference, [column * (self.factor * self.largest) for column in columns], own)

    def _move(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """A row's inputs with every rounding of near-middle numbers flipped.

        Every combination of these roundings is tried.
        """
        moves: dict[int, float] = {}
        for first in self.firsts:
            places, steps, numbers = find_near(x[None], first, "given")
            rounded = (first(x[None].float()) / steps).round()
            for place in places[:, 1].tolist():
                number = numbers[0, place]
                away = 1.0 if rounded[0, place] <= number else -1.0  # to the other of the two
                moves[place] = float(away * 4 * NEAR_MIDDLE["given"][1] * (1 + number.abs()) * steps[0, place])
        some = list(moves.items())[:_MOST_MOVED]
        for choice in range(1, 1 << len(some)):
            moved = x.clone()
            for bit, (place, move) in enumerate(some):
                if choice >> bit & 1:
                    moved[place] += move
            yield moved


def _take_off(difference: torch.Tensor, columns: list[torch.Tensor], own: torch.Tensor) -> float:
    """Relative error of a difference [N] after removing explained steps.

    Each column explains one step at most.

    Infinite where none can be.
    """
    length = own.norm().clamp(min=_TINY)
    if not columns:
        return float(difference.norm() / length)
    if len(columns) > _MOST_FLIPS or not torch.isfinite(difference).all():
        return math.inf
    basis = torch.stack(columns, -1).double()
    share = torch.linalg.lstsq(basis, difference[:, None], rcond=_ALIKE, driver="gelsd").solution
    return (
        float((difference - (basis @ share)[:, 0]).norm() / length)
        if float(share.abs().max()) <= _WHOLE_STEP
        else math.inf
    )


def find_near(x: torch.Tensor, rounding: EightBits, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices [n, 2] of x [T, K] near a rounding boundary.

    In the middle of two integers of 8 bits; and the steps [T, K].

    And how many steps it is.
    """
    numbers, steps = rounding.in_steps(x.float())
    below = numbers.floor()
    least, share = NEAR_MIDDLE[kind]
    near = (numbers - below - 0.5).abs() <= least + share * numbers.abs()
    near &= (below >= rounding.lowest) & (below < rounding.highest)  # beyond them all is one integer
    return near.nonzero(), steps, numbers


def near_middle(x: torch.Tensor, weight: torch.Tensor, rounding: Round, kind: str) -> list[list[torch.Tensor]]:
    """Near-middle numbers of each row of x [T, K].

    Columns of the matrix, by one step, whose inputs lie so near the middle that either integer may be taken.
    """
    found: list[list[torch.Tensor]] = [[] for _ in x]
    if isinstance(rounding, EightBits) and weight.shape[1] == x.shape[-1]:
        places, steps, _ = find_near(x, rounding, kind)
        for row, column in places.tolist():
            found[row].append(weight[:, column] * steps[row, column])
    return found
