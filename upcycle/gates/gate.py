"""The gate: from router logits to chosen experts and their weights, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Gate:
    """From router logits to chosen experts and their weights, for one layer.

    score: what turns logits into weights; softmax before the top-k equals softmax after it when weights are
    renormalized.
    renormalize: the chosen weights are divided by their sum.
    scale: factor on the final weights.

    A bias on the scores, for the choice alone, is a weight of the layer: `MoeLayer.selection_bias`.
    """

    num_experts: int
    num_experts_per_tok: int
    score: Score
    renormalize: bool
    scale: float = 1.0


def selection_scores(logits: torch.Tensor, score: Score, bias: torch.Tensor | None) -> torch.Tensor:
    """What the top k are chosen by, [..., E], of router logits [..., E].

    The logits themselves, or scores plus `bias` [E].
    Both scores keep the order of their logits; two that they would round to one stay apart.
    """
    if bias is None:
        return logits
    return (logits.softmax(-1) if score == "softmax" else logits.sigmoid()) + bias


def log_scores(logits: torch.Tensor, score: Score) -> torch.Tensor:
    """Logarithms of scores that sum to 1 over all experts, [..., E], of router logits [..., E]."""
    return (logits if score == "softmax" else F.logsigmoid(logits)).log_softmax(-1)


def choose_experts(logits: torch.Tensor, routing: Gate, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers [tokens, k] of the experts that each token visits, of router logits [tokens, E]."""
    chosen = selection_scores(logits, routing.score, bias).topk(routing.num_experts_per_tok, dim=-1).indices
    scores = logits.softmax(-1) if routing.score == "softmax" else logits.sigmoid()
    weights = scores.gather(-1, chosen)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routing.scale, chosen
