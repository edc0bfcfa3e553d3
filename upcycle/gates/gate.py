"""The gate: from router logits to chosen experts and their weights, in torch.

Four things are apart, in this order:

1. The *score* of each expert: a softmax of the logits, or a sigmoid of each.
2. The *choice*, by selection scores: the logits themselves, or scores plus a bias where the gate has one.
3. The chosen scores are *renormalized*, or not: divided by their sum.
4. The weights are *scaled* by a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F

from dense2moe.upcycle.gates.choice import Choice, choose, max_experts
from dense2moe.upcycle.gates.routes import Routes

Score = Literal["softmax", "sigmoid"]

SMALLEST_TOTAL = 1e-20
"""Added to the sum that weights are divided by, as transformers does it (modeling_glm4_moe.py, 5.23).

Where all chosen sigmoids are zero in float32, weights are zero instead of no number. A softmax never notices."""


@dataclass(frozen=True)
class Gate:
    """From router logits to chosen experts and their weights, for one layer.

    score: what turns logits into weights.
    choice: which experts a token visits, by their selection scores.
    renormalize: the chosen weights are divided by their sum.
    scale: factor on the final weights.
    selection_bias: whether a tensor [num_experts] of the layer is added to the scores, for the choice and not for the
    weights (DeepSeek-V3, section 2.1.2).
    """

    num_experts: int
    choice: Choice
    score: Score = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    selection_bias: bool = False

    @property
    def max_experts_per_token(self) -> int:
        """How many experts a token visits at most."""
        return max_experts(self.choice)


def score_experts(logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """The score of every expert, [..., E], from router logits [..., E]."""
    match gate.score:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case _:
            assert_never(gate.score)


def log_scores(logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Logarithms of scores, [..., E], up to a number for each token, from router logits [..., E].

    Their softmax is each expert's share of the sum of scores. An expert far from all others keeps a finite logarithm.
    """
    match gate.score:
        case "softmax":
            return logits
        case "sigmoid":
            return F.logsigmoid(logits)
        case _:
            assert_never(gate.score)


def selection_scores(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> torch.Tensor:
    """What experts are chosen by, [..., E], from router logits [..., E].

    Scores plus `bias` [E]; without one the logits, whose order every score keeps: two that a score would round to one
    stay apart. `bias` may be None for a gate that has one, to ask for the choice that it would make without.
    """
    assert bias is None or gate.selection_bias, "a bias was given to a gate that has none"
    return logits if bias is None else score_experts(logits, gate) + bias


def choose_experts(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> torch.Tensor:
    """The experts that each token visits, int64 [..., K], from router logits [..., E]."""
    return choose(selection_scores(logits, gate, bias), gate.choice)


def route(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> Routes:
    """The routes of tokens, from router logits [T, E] and the layer's selection bias [E], if its gate has one."""
    assert gate.selection_bias == (bias is not None), "a gate is given its selection bias, if it has one"
    experts = choose_experts(logits, gate, bias)
    weights = score_experts(logits, gate).gather(-1, experts)
    if gate.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_TOTAL)
    return Routes.of_table(experts, weights * gate.scale)
