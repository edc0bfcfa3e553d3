"""The routing record: what a router's logits mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """From router logits to chosen experts and their weights, for one layer.

    score: what turns logits into weights; softmax before the top-k equals softmax after it when weights are renormalized.
    renormalize: the chosen weights are divided by their sum.
    scale: factor on the final weights.

    A bias on the scores, for the choice alone, is a weight of the layer: `MoeLayer.selection_bias`.
    """

    num_experts: int
    num_experts_per_tok: int
    score: Literal["softmax", "sigmoid"]
    renormalize: bool
    scale: float = 1.0
