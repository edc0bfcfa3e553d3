"""The choice of experts by selection scores: pure tensor functions."""

from __future__ import annotations

import math
from typing import assert_never

import torch

from dense2moe.upcycle.gates.gate import Choice, TopK


def choose(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Experts that each token visits, int64 [..., K].

    Computed from selection scores [..., E].
    """
    match choice:
        case TopK(k):
            return scores.topk(k, dim=-1).indices
        case _:
            assert_never(choice)


def choice_margin(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Gap of selection scores [..., E] that decides the choice; [...].

    Infinite where every expert is chosen.

    Of a top-k: the last chosen score minus the first that is left out.
    """
    match choice:
        case TopK(k):
            if k == scores.shape[-1]:
                return torch.full(scores.shape[:-1], math.inf, dtype=scores.dtype)
            ordered = scores.topk(k + 1, dim=-1).values
            return ordered[..., -2] - ordered[..., -1]
        case _:
            assert_never(choice)
