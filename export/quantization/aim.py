"""Weights shifted before quantization to cancel errors upstream (GPTAQ).

A matrix W that gave X~ W' in the float model reads X instead, behind matrices that are quantized. The weights that come
nearest to the old outputs, min |X~ W' + D - X V'|² + damping |V - W|² over V, are V' = W' + (X'X + damping)⁻¹ X'((X~ -
X) W' + D), and since the distance from the minimum is the quadratic form of X'X, quantizing V with that form quantizes
W for the old outputs (GPTAQ, Li et al., 2025, section 3, in closed form). D is what else the outputs are to make up
for. Each token counts by the square of its output's weight in the layer's output.

V is fitted on most of the tokens; how far to go from W towards it, the others say: as far as serves them best, and not
at all where nothing does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from dense2moe.export.quantization.inputs import Inputs

DAMPING = 0.01
"""Of the mean of the diagonal of X'X, added to it (GPTQ, section 3.3)."""
_FITTED_SHARE = 0.75
_PANELS = 4
"""Of columns in X'X: with four, three eighths of its products need not be made."""


@dataclass(frozen=True)
class Tokens:
    """Inputs [T, K], and their shortfall against the float model [T, K].

    And the drift [T, N] where there is one.
    """

    actual: torch.Tensor
    lost: torch.Tensor
    drift: torch.Tensor | None

    def wanted(self, weight: torch.Tensor) -> torch.Tensor:
        """The correction that the outputs [T, N] need.

        `weight` is [N, K].
        """
        lost = self.lost @ weight.T
        return lost if self.drift is None else lost.add_(self.drift)


@dataclass(frozen=True)
class Aim:
    """Moments X'X of inputs, float32 [K, K], and the weights' shift.

    Steps are fitted on some tokens, and their length on others, which are `held`. `factor` is the Cholesky factor of
    the damped moments of the fitted tokens, float64.
    """

    hessian: torch.Tensor
    fitted: Tokens
    held: Tokens
    factor: torch.Tensor

    @cached_property
    def _turn(self) -> torch.Tensor:
        """The matrix that gives the step where no drift is corrected.

        It multiplies weights [N, K].

        The same for all of them.
        """
        return self._solve(self.fitted.actual.T @ self.fitted.lost)

    def _solve(self, products: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(products.double(), self.factor).T.float()

    def find_step(self, weight: torch.Tensor) -> torch.Tensor:
        """The step [N, K] from `weight` to the least-error weights.

        The error is measured on the fitted tokens.
        """
        if self.fitted.drift is None:
            return weight @ self._turn
        return self._solve(self.fitted.actual.T @ self.fitted.wanted(weight))

    def move(self, weight: torch.Tensor) -> torch.Tensor:
        """The shifted weights [N, K], to quantize instead of `weight`."""
        step, wanted = self.find_step(weight), self.held.wanted(weight)
        gained = self.held.actual @ step.T
        strength = (gained * wanted).sum() / gained.square().sum().clamp(min=1e-30)
        return weight + strength.clamp(0, 1) * step


def find_aim(inputs: Inputs) -> Aim:
    """The aim of matrices that read `inputs`, at least one token."""
    factors = torch.ones(len(inputs.actual), 1) if inputs.weights is None else inputs.weights[:, None]
    factors = factors / factors.square().mean().sqrt().clamp(min=1e-30)
    actual, lost = inputs.actual * factors, (inputs.reference - inputs.actual).mul_(factors)
    drift = None if inputs.drift is None else inputs.drift * factors
    num_fitted = int(_FITTED_SHARE * len(actual))
    fitted, held = (
        Tokens(actual[part], lost[part], None if drift is None else drift[part])
        for part in (slice(num_fitted), slice(num_fitted, None))
    )
    moments = square(fitted.actual)
    return Aim(moments + square(held.actual), fitted, held, torch.linalg.cholesky(damp(moments).double()))


def square(x: torch.Tensor) -> torch.Tensor:
    """X'X [K, K] of x [T, K].

    What lies above the diagonal's blocks is copied from below.
    """
    width = x.shape[1]
    result, step = x.new_empty(width, width), max(1, math.ceil(width / _PANELS))
    for start in range(0, width, step):
        rows = slice(start, start + step)
        result[rows, : start + step] = x[:, rows].T @ x[:, : start + step]
        result[:start, rows] = result[rows, :start].T
    return result


def damp(hessian: torch.Tensor) -> torch.Tensor:
    """X'X [K, K] with a damped diagonal.

    An input that is always zero gets a one on the diagonal.
    """
    dead = hessian.diagonal() == 0
    return hessian + torch.diag(dead.to(hessian.dtype) + DAMPING * hessian.diagonal()[~dead].mean().nan_to_num())
