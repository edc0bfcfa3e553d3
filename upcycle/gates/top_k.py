"""Top-k: each token visits the k experts with the largest selection scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TopK:
    """Each token visits `k` experts."""

    k: int


def take_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The experts with the k largest of `scores` [..., E], the largest first; int64 [..., k]."""
    return scores.topk(k, dim=-1).indices


def top_k_margin(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of `scores` [..., E] minus the next; [...], infinite where all experts are chosen."""
    if k == scores.shape[-1]:
        return torch.full(scores.shape[:-1], math.inf, dtype=scores.dtype)
    ordered = scores.topk(k + 1, dim=-1).values
    return ordered[..., -2] - ordered[..., -1]
