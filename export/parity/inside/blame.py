"""Blame: which experts are wrong, and whether by a constant factor."""

from __future__ import annotations

import torch

from dense2moe.upcycle.gates.choice import visit_mask
from dense2moe.upcycle.gates.gate import Choice

_HEARD = 0.05
"""An expert with a smaller weight than this in a token is not judged by it."""
_STRAIGHT = 1e-3
"""Relative: an output that differs from a multiple of the twin's by less is that multiple."""
_TINY = 1e-30


def find_wrong_experts(scores: torch.Tensor, choice: Choice, wrong: torch.Tensor) -> tuple[int, ...]:
    """Experts that are wrong in every token with enough of their weight.

    `scores` [T, E] are what experts are chosen by, `wrong` [T] the tokens whose output is beyond the limit. An expert
    that has 5 % of a softmax has at least 5 % by sigmoids, whose weights lie closer together.
    """
    visited = visit_mask(scores, choice)
    heard = visited & (scores.masked_fill(~visited, -torch.inf).softmax(-1) >= _HEARD)
    return tuple(number for number, own in enumerate(heard.T) if own.any() and wrong[own].all())


def find_factors(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float] | None:
    """Least and largest factor between outputs [T, H] and expected ones.

    None where a token's output is no multiple of the expected output.
    """
    a, b = found.double(), expected.double()
    size = b.norm(dim=-1).clamp(min=_TINY)
    factor = (a * b).sum(-1) / size.square()
    straight = bool(((a - factor[:, None] * b).norm(dim=-1) <= _STRAIGHT * size).all())
    return (float(factor.min()), float(factor.max())) if straight else None
