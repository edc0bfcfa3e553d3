"""Calibration inputs of a matrix, after quantized layers and in float.

As the quantized layers before it give them, and as the float model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Inputs:
    """Inputs of a matrix, float32, one row a token.

    actual: [tokens, K], behind what is before them as it is quantized. reference: the same tokens in the float model.
    drift: [tokens, N], what is to be added to the outputs for the residual stream to be the float model's again; None
    where that is left to others.
    weights: [tokens], the factors that the outputs have in the layer's output; None is one.
    """

    actual: torch.Tensor
    reference: torch.Tensor
    drift: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def is_float(self) -> bool:
        """Whether nothing upstream is quantized: both are one tensor."""
        return self.actual is self.reference


@dataclass(frozen=True)
class Scaled:
    """A layer whose blocks read scaled inputs; its function is kept.

    Tensors in the place of the checkpoint's, by name, and what the inputs of a place in `Group` are divided by.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def divide(self, x: torch.Tensor, place: str) -> torch.Tensor:
        """The scaled input at a place, for the plain input [tokens, K]."""
        return x / self.scales[place] if place in self.scales else x
