"""Routes: one row a visit, of token, expert and weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dense2moe.upcycle.gates.choice import choose, find_visited
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.scores import score_experts, selection_scores

SMALLEST_TOTAL = 1e-20
"""Added to the sum that weights are divided by, as transformers does it (modeling_glm4_moe.py, 5.23).

Where all chosen sigmoids are zero in float32, weights are zero instead of no number. A softmax never notices."""


@dataclass(frozen=True)
class Routes:
    """Routes of `num_tokens` tokens, one row a visit, whatever the gate.

    Rows of a token lie side by side, and tokens in order.

    token, expert: int64 [R]; weight: [R].
    """

    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    num_tokens: int

    @classmethod
    def of_table(cls, experts: torch.Tensor, weights: torch.Tensor, visited: torch.Tensor | None = None) -> Routes:
        """Routes from a table of experts and weights, [T, K].

        Every token visits K experts, or as many of them as `visited`, bool [T, K], says.
        """
        num_tokens, count = experts.shape
        token = torch.arange(num_tokens, device=experts.device).repeat_interleave(count)
        rows = slice(None) if visited is None or visited.all() else visited.flatten()
        return cls(token[rows], experts.flatten()[rows], weights.flatten()[rows], num_tokens)

    def as_table(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts, int64 [T, count], and their weights, as a fixed shape.

        Weights are [T, count]. A place that a token leaves free is expert 0 with weight 0. No token may visit more than
        `count` experts.
        """
        visits = self.token.bincount(minlength=self.num_tokens)
        place = torch.arange(len(self.token), device=self.token.device) - (visits.cumsum(0) - visits)[self.token]
        experts = self.expert.new_zeros(self.num_tokens, count)
        weights = self.weight.new_zeros(self.num_tokens, count)
        experts[self.token, place], weights[self.token, place] = self.expert, self.weight
        return experts, weights


def route(logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> Routes:
    """The routes of tokens, from router logits [T, E].

    `bias` [E] is the layer's selection bias; None of a gate without one.
    """
    assert gate.selection_bias == (bias is not None), "a gate is given its selection bias, if it has one"
    selection = selection_scores(logits, gate, bias)
    experts = choose(selection, gate.choice)
    visited = find_visited(selection.gather(-1, experts), selection.sum(-1, keepdim=True), gate.choice)
    weights = score_experts(logits, gate).gather(-1, experts) * visited
    if gate.renormalize and gate.score == "relu":  # where all positive parts are zero, the first has the whole weight
        weights = torch.maximum(weights, SMALLEST_TOTAL * (torch.arange(weights.shape[-1], device=weights.device) == 0))
        weights = weights / weights.sum(-1, keepdim=True)
    elif gate.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_TOTAL)
    return Routes.of_table(experts, weights * gate.scale, visited)
