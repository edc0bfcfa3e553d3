"""Scores of experts, from router logits: pure tensor functions."""

from __future__ import annotations

from typing import assert_never

import torch
import torch.nn.functional as F

from dense2moe.upcycle.gates.choice import choose, visit_mask
from dense2moe.upcycle.gates.gate import Gate

_LEAST_SCORE = 1e-20
"""A positive part below it has this one's logarithm."""


def score_experts(logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """The score of every expert, [..., E], from router logits [..., E]."""
    match gate.score:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "relu":
            return logits.relu()
        case _:
            assert_never(gate.score)


def log_scores(logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Logarithms of scores, [..., E], up to a constant per token.

    Computed from router logits [..., E]. Their softmax is each expert's share of the sum of scores. An expert far from
    all others keeps a finite logarithm.
    """
    match gate.score:
        case "softmax":
            return logits
        case "sigmoid":
            return F.logsigmoid(logits)
        case "relu":
            return logits.clamp(min=_LEAST_SCORE).log()
        case _:
            assert_never(gate.score)


def selection_scores(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> torch.Tensor:
    """Scores by which experts are chosen, [..., E], from logits [..., E].

    Scores plus `bias` [E]. Of a top-k without one the logits, whose order every score keeps: two that a score would
    round to one stay apart; and of positive parts, of which a logit says as much and all that are zero are apart.
    `bias` may be None for a gate that has one, to ask for the choice that it would make without.
    """
    assert bias is None or gate.selection_bias, "a bias was given to a gate that has none"
    if bias is not None:
        return score_experts(logits, gate) + bias
    return score_experts(logits, gate) if gate.may_leave_free and gate.score != "relu" else logits


def choose_experts(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> torch.Tensor:
    """Each token's best experts, int64 [..., K], from logits [..., E]."""
    return choose(selection_scores(logits, gate, bias), gate.choice)


def visit_experts(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> torch.Tensor:
    """Which experts each token visits, bool [..., E], from logits [..., E]."""
    return visit_mask(selection_scores(logits, gate, bias), gate.choice)
