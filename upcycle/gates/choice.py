"""The choice: which experts a token visits, by its selection scores.

A new choice is a record in a file of its own, and a case in each function here and in `dense2moe.export.gates`.
"""

from __future__ import annotations

from typing import TypeAlias, assert_never

import torch

from dense2moe.upcycle.gates.top_k import TopK, take_top_k, top_k_margin

Choice: TypeAlias = TopK  # a union, once there is a second


def max_experts(choice: Choice) -> int:
    """How many experts a token visits at most."""
    match choice:
        case TopK(k):
            return k
        case _:
            assert_never(choice)


def choose(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The experts that each token visits, int64 [..., K], by selection scores [..., E]."""
    match choice:
        case TopK(k):
            return take_top_k(scores, k)
        case _:
            assert_never(choice)


def choice_margin(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """By how much selection scores [..., E] decide which experts a token visits; [...], infinite where nothing can."""
    match choice:
        case TopK(k):
            return top_k_margin(scores, k)
        case _:
            assert_never(choice)
