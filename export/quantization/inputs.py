"""Calibration inputs of a matrix, after quantized layers and in float.

As the quantized layers before it give them, and as the float model does.
"""

from __future__ import annotations

from dataclasses import dataclass

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
