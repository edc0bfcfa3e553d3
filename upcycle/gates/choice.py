"""The choice of experts by selection scores: pure tensor functions."""

from __future__ import annotations

import math
from typing import assert_never

import torch

from dense2moe.upcycle.gates.gate import Above, Choice, Mass, Near, TopK, most_experts


def choose(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The best experts of each token, int64 [..., K], best first.

    Computed from selection scores [..., E]. K is the most that a token may visit; `find_visited` tells which are.
    """
    return scores.topk(most_experts(choice), dim=-1).indices


def find_visited(best: torch.Tensor, total: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Which of a token's best experts it visits, bool [..., K].

    `best` has their selection scores [..., K], highest first; `total` [..., 1] the sum of the scores of all experts.
    """
    first = torch.arange(best.shape[-1], device=best.device) == 0
    match choice:
        case TopK():
            return torch.ones_like(best, dtype=torch.bool)
        case Above(level):
            return first | (best > level)
        case Mass(share):
            return best.cumsum(-1) - best < share * total
        case Near(share):
            return best >= share * best[..., :1]
        case _:
            assert_never(choice)


def visit_mask(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Which experts each token visits, bool [..., E], from selection scores."""
    chosen = choose(scores, choice)
    visited = find_visited(scores.gather(-1, chosen), scores.sum(-1, keepdim=True), choice)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, visited)


def choice_margin(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """How far selection scores [..., E] are from another choice; [...].

    Infinite where no change could make another one. Of a top-k: the last chosen score minus the first that is left out.
    Of other choices also the distance of the nearest expert from what decides on it.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    most = most_experts(choice)
    best, total = ordered[..., :most], ordered.sum(-1, keepdim=True)
    count = find_visited(best, total, choice).sum(-1, keepdim=True)
    beyond = torch.nn.functional.pad(ordered, (0, 1), value=-math.inf)  # behind the last expert none follows
    gap = (ordered.gather(-1, count - 1) - beyond.gather(-1, count))[..., 0]
    match choice:
        case TopK():
            return gap
        case Above(level):
            nearest = (best[..., 1:] - level).abs()
        case Mass(share):
            nearest = (best.cumsum(-1)[..., :-1] - share * total).abs()
        case Near(share):
            nearest = (best[..., 1:] - share * best[..., :1]).abs()
        case _:
            assert_never(choice)
    return torch.minimum(gap, nearest.amin(-1)) if most > 1 else gap
