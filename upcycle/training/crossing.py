"""Crossings: where a mixture's loss falls below its control's.

1. A curve is the validation loss against what was spent so far: tokens, or floating-point operations, those of branches
   included. At each point it is the best of the phase until then, whose weights would be kept.
2. Between two points the loss is taken to be linear in the logarithm of what was spent; behind its last point a curve
   stays where it is.
3. The mixture and its control have schedules of the same shape, stretched to what each may spend, so that they are
   equally far in them wherever they are compared.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dense2moe.upcycle.training.history import ModelName, Step

Curve = Sequence[tuple[float, float]]
"""Points (spent, loss), in order; what was spent is above 0."""


@dataclass(frozen=True)
class Crossing:
    """The validation losses of the mixture and of a control, compared.

    From `begin` to `end`, in tokens or operations. `at` is where the mixture overtakes: from there to the end its loss
    is lower; `begin` where it is lower everywhere, None where it is not at the end. Gaps are the mixture's loss minus
    the control's, in nats a token, at the begin and at the end.
    """

    begin: float
    end: float
    at: float | None
    first_gap: float
    last_gap: float


def find_crossings(history: Sequence[Step]) -> dict[ModelName, Crossing]:
    """Where the mixture overtakes each control.

    In tokens the one continued on the same tokens, in operations the other.
    """

    def trace(model: ModelName, by_tokens: bool) -> Curve:
        steps = (step for step in history if step.model == model)
        return trace_best(
            (step.phase, step.num_tokens if by_tokens else step.flops, step.validation_loss) for step in steps
        )

    controls: dict[ModelName, bool] = {"dense continued": True, "dense, same FLOPs": False}
    found = {
        name: find_crossing(trace("fine-tuned", by_tokens), trace(name, by_tokens))
        for name, by_tokens in controls.items()
    }
    return {name: crossing for name, crossing in found.items() if crossing is not None}


def trace_best(points: Iterable[tuple[int, float | None, float | None]]) -> Curve:
    """The curve of each phase's best losses so far.

    Points are (phase, spent, loss). Those without a loss, and those before anything was spent, are left out; of several
    at one place the last counts.
    """
    best: dict[int, float] = {}
    curve: dict[float, float] = {}
    for phase, spent, loss in points:
        if loss is None or spent is None:
            continue
        best[phase] = min(loss, best.get(phase, math.inf))
        if spent > 0:
            curve[spent] = best[phase]
    return tuple(curve.items())


def find_crossing(mixture: Curve, control: Curve) -> Crossing | None:
    """Where the mixture's curve falls below the control's for good.

    None where one of the curves has no point.
    """
    if not mixture or not control:
        return None
    begin = max(mixture[0][0], control[0][0])
    places = sorted({place for place, _ in (*mixture, *control) if place >= begin})
    gaps = [(place, _read(mixture, place) - _read(control, place)) for place in places]
    return Crossing(begin, places[-1], _find_place(gaps), gaps[0][1], gaps[-1][1])


def _find_place(gaps: Sequence[tuple[float, float]]) -> float | None:
    """The place from which on all gaps are negative."""
    if gaps[-1][1] >= 0:
        return None
    at = gaps[-1][0]
    for (before, above), (after, below) in reversed(list(pairwise(gaps))):
        if above >= 0:
            share = above / (above - below)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
        at = before
    return at


def _read(curve: Curve, place: float) -> float:
    """The loss of a curve at a place behind its first point."""
    number = bisect_left(curve, place, key=lambda point: point[0])
    if number == len(curve):
        return curve[-1][1]
    after, loss = curve[number]
    if after == place:
        return loss
    before, earlier = curve[number - 1]
    share = math.log(place / before) / math.log(after / before)
    return (1 - share) * earlier + share * loss
