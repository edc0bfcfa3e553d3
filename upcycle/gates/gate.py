"""The gate: the rule by which tokens choose experts.

Four things are apart, in this order:

1. The *score* of each expert: a softmax of the router's logits, or a sigmoid of each.
2. The *choice*, by selection scores: the logits themselves, or scores plus a bias where the gate has one.
3. The chosen scores are *renormalized*, or not: divided by their sum.
4. The weights are *scaled* by a number.

What they mean in torch is said once: `scores`, `choice` and `routes` beside this file. Records alone: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TopK:
    """Each token visits the `k` experts with the largest selection scores."""

    k: int


Choice: TypeAlias = TopK
"""How a token's experts follow from their selection scores; a union, once there is a second way."""


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
        match self.choice:
            case TopK(k):
                return k
            case _:
                assert_never(self.choice)
