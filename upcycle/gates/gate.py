"""The gate: the rule by which tokens choose experts.

Four things are apart, in this order:

1. The *score* of each expert: a softmax of the router's logits, a sigmoid of each, or its positive part.
2. The *choice*, by selection scores: scores, plus a bias where the gate has one; of a top-k without one, and of
   positive parts, the logits, as they have the same order. A choice names at most as many experts as `most_experts`
   says, and some may be left free.
3. The chosen scores are *renormalized*, or not: divided by their sum.
4. The weights are *scaled* by a number.

What they mean in torch is said once: `scores`, `choice` and `routes` beside this file. Records alone: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Score = Literal["softmax", "sigmoid", "relu"]


@dataclass(frozen=True)
class TopK:
    """Each token visits the `k` experts with the largest selection scores."""

    k: int


@dataclass(frozen=True)
class Above:
    """Each token visits the experts whose score is above `level`.

    Its best in any case, and `most` at most. Of sigmoids a threshold gate (DynMoE, Guo et al. 2024, arXiv:2405.14297,
    section 3.1); of positive parts, above 0, ReMoE's (Wang et al. 2024, arXiv:2412.14711, section 3), which however may
    visit no expert at all.
    """

    level: float
    most: int


@dataclass(frozen=True)
class Mass:
    """Each token visits as few experts as have `share` of all scores.

    Its best ones, and `most` at most. Top-p (Huang et al. 2024, arXiv:2403.07652, section 3).
    """

    share: float
    most: int


@dataclass(frozen=True)
class Near:
    """Each token visits its best expert, and others that come near it.

    They are among its best `most`, and their score is at least `share` of the best expert's. Dynamic skipping (Lu et
    al. 2024, arXiv:2402.14800, section 3, for two experts).
    """

    share: float
    most: int


Choice: TypeAlias = TopK | Above | Mass | Near
"""How a token's experts follow from their selection scores."""


def most_experts(choice: Choice) -> int:
    """How many experts a token visits at most."""
    return choice.k if isinstance(choice, TopK) else choice.most


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
        return most_experts(self.choice)

    @property
    def may_leave_free(self) -> bool:
        """Whether a token may visit fewer experts than others do."""
        return not isinstance(self.choice, TopK)
