"""Weights aim at the outputs of the float model.

Least squares by numpy in float64, and never worse than to stay on tokens held out.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dense2moe.export.quantization.aim import DAMPING, find_aim, square
from dense2moe.export.quantization.inputs import Inputs


def draw(
    tokens: int, width: int, rows: int, noise: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs of the float model, inputs that are less by a linear part and by noise.

    And a drift that they foretell.
    """
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(tokens, width, generator=generator) * torch.rand(width, generator=generator).add(0.2)
    lost = reference @ torch.randn(width, width, generator=generator) * 0.1 / width**0.5
    actual = reference - lost + noise * torch.randn(tokens, width, generator=generator)
    drift = actual @ torch.randn(width, rows, generator=generator) * 0.1 + noise * torch.randn(
        tokens, rows, generator=generator
    )
    return torch.randn(rows, width, generator=generator) / width**0.5, reference, actual, drift


def distance(weight: torch.Tensor, moved: torch.Tensor, inputs: Inputs) -> float:
    target = inputs.reference.double() @ weight.double().T
    target = target if inputs.drift is None else target + inputs.drift
    factors = torch.ones(len(target)) if inputs.weights is None else inputs.weights
    return float(((target - inputs.actual.double() @ moved.double().T) * factors[:, None]).square().sum())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("drifts", [False, True])
def test_the_direction_is_that_of_damped_least_squares_in_float64(drifts: bool, weighed: bool) -> None:
    weight, reference, actual, drift = draw(400, 16, 8, 0.05)
    weights = torch.rand(400, generator=torch.Generator().manual_seed(3)) if weighed else None
    inputs = Inputs(actual, reference, drift if drifts else None, weights)
    aim = find_aim(inputs)
    factors = (weights if weights is not None else torch.ones(400)).double().numpy()[:300, None]
    factors = factors / np.sqrt(
        np.square((weights if weights is not None else torch.ones(400)).double().numpy()).mean()
    )
    x = actual.double().numpy()[:300] * factors
    wanted = (
        reference.double().numpy()[:300] @ weight.double().numpy().T + (drift.double().numpy()[:300] if drifts else 0)
    ) * factors
    ridge = np.sqrt(DAMPING * np.diag(x.T @ x).mean()) * np.eye(16)
    expected = np.linalg.lstsq(
        np.vstack([x, ridge]), np.vstack([wanted, ridge @ weight.double().numpy().T]), rcond=None
    )[0].T
    found = weight + aim.find_step(weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert distance(weight, aim.move(weight), inputs) < 0.5 * distance(weight, weight, inputs)


def test_where_the_loss_cannot_be_foretold_weights_go_nearly_nowhere() -> None:
    """Few tokens and noise alone: the fit would be off by as much again on tokens that it has not seen."""
    weight, reference, _, _ = draw(40, 16, 8, 0.0)
    actual = reference + 0.2 * torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    drift = torch.randn(40, 8, generator=torch.Generator().manual_seed(6))
    fresh = torch.randn(1000, 16, generator=torch.Generator().manual_seed(7))
    inputs = Inputs(actual, reference, drift)
    aim = find_aim(inputs)
    held = Inputs(actual[30:], reference[30:], drift[30:])
    step = aim.find_step(weight)
    assert distance(weight, aim.move(weight), held) <= distance(weight, weight, held) * (1 + 1e-6)
    assert distance(weight, aim.move(weight), held) <= distance(weight, weight + step, held)
    assert float((fresh @ (aim.move(weight) - weight).T).norm()) < 0.7 * float((fresh @ step.T).norm())


def test_streams_that_are_one_leave_weights_as_they_are() -> None:
    weight, reference, _, _ = draw(50, 16, 8, 0.0)
    assert torch.equal(find_aim(Inputs(reference, reference)).move(weight), weight)


def test_inputs_that_are_always_zero_move_nothing() -> None:
    weight, reference, actual, _ = draw(200, 16, 8, 0.01)
    actual[:, 3:5] = 0
    moved = find_aim(Inputs(actual, reference)).move(weight)
    assert torch.isfinite(moved).all()
    assert torch.equal(moved[:, 3:5], weight[:, 3:5])


@pytest.mark.parametrize("width", [1, 3, 4, 5, 130])
def test_moments_are_the_product_and_symmetric_to_the_bit(width: int) -> None:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    found = square(x)
    np.testing.assert_allclose(found.numpy(), x.double().numpy().T @ x.double().numpy(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)
