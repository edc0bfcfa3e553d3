"""Weights moved before they are quantized, so that outputs on what is read now are those of the float model.

A matrix W that gave X~ W' in the float model reads X instead, behind matrices that are quantized. The weights that come nearest to the old outputs,
min |X~ W' + D - X V'|² + damping |V - W|² over V, are V' = W' + (X'X + damping)⁻¹ X'((X~ - X) W' + D), and since the distance from the minimum is
the quadratic form of X'X, quantizing V with that form quantizes W for the old outputs (GPTAQ, Li et al., 2025, section 3, in closed form). D is what
else the outputs are to make up for. Each token counts by the square of its output's weight in the layer's output.

V is fitted on most of the tokens; how far to go from W towards it, the others say: as far as serves them best, and not at all where nothing does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from export.inputs import Inputs

DAMPING = 0.01
"""Of the mean of the diagonal of X'X, added to it (GPTQ, section 3.3)."""
_FITTED_SHARE = 0.75


@dataclass(frozen=True)
class Aim:
    """The moments X'X of all inputs, float32 [K, K], and where weights [N, K] are to go: to W + W @ turn + push, fitted on the first tokens.

    The others are in `held`: what is read [T, K], how much less it is than in the float model [T, K], and the drift [T, N].
    """

    hessian: torch.Tensor
    turn: torch.Tensor
    push: torch.Tensor | None
    held: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

    def move(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights [N, K] to quantize in the place of `weight`."""
        step = weight @ self.turn
        actual, lost, drift = self.held
        wanted = lost @ weight.T
        if self.push is not None and drift is not None:
            step, wanted = step + self.push, wanted + drift
        gained = actual @ step.T
        strength = (gained * wanted).sum() / gained.square().sum().clamp(min=1e-30)
        return weight + strength.clamp(0, 1) * step


def find_aim(inputs: Inputs) -> Aim:
    """The aim of matrices that read `inputs`, of at least one token."""
    factors = torch.ones(len(inputs.actual), 1) if inputs.weights is None else inputs.weights[:, None]
    factors = factors / factors.square().mean().sqrt().clamp(min=1e-30)
    actual, lost = inputs.actual * factors, (inputs.reference - inputs.actual) * factors
    drift = None if inputs.drift is None else inputs.drift * factors
    fitted = int(_FITTED_SHARE * len(actual))
    x = actual[:fitted]
    factor = torch.linalg.cholesky(damp(x.T @ x).double())
    turn = torch.cholesky_solve((x.T @ lost[:fitted]).double(), factor).T.float()
    push = None if drift is None else torch.cholesky_solve((x.T @ drift[:fitted]).double(), factor).T.float()
    return Aim(actual.T @ actual, turn, push, (actual[fitted:], lost[fitted:], None if drift is None else drift[fitted:]))


def damp(hessian: torch.Tensor) -> torch.Tensor:
    """X'X [K, K] with the damping on its diagonal, and one where an input is always zero."""
    dead = hessian.diagonal() == 0
    return hessian + torch.diag(dead.to(hessian.dtype) + DAMPING * hessian.diagonal()[~dead].mean().nan_to_num())
