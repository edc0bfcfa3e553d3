"""Each method of merging against a slow reference in numpy, or an example by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dense2moe.upcycle.building.merging import (
    apply_change,
    average_changes,
    drop_elements,
    elect_changes,
    find_threshold,
    sum_changes,
)

Array = np.ndarray[Any, np.dtype[Any]]


def draw(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(7, 11).normal_(generator=generator) for _ in range(count)]


def exact(tensors: list[torch.Tensor]) -> list[Array]:
    return [tensor.numpy().astype(np.float64) for tensor in tensors]


def test_ties_by_hand() -> None:
    """Of the paper's kind: one large change against two small ones, which the threshold trims or not."""
    changes = [torch.tensor([4.0, 1.0, -2.0, 0.5, 3.0]), torch.tensor([-1.0, 3.0, -4.0, 0.0, -3.0])]
    # trimmed to 60 %: [4, 0, -2, 0, 3] and [0, 3, -4, 0, -3]; signs +, +, -, none, none
    thresholds = [find_threshold(lambda change=change: [change], 0.6) for change in changes]
    assert thresholds == [2.0, 3.0]
    assert elect_changes(changes, thresholds, 1.0).tolist() == [4.0, 3.0, -3.0, 0.0, 0.0]
    assert elect_changes(changes, thresholds, 0.5).tolist() == [2.0, 1.5, -1.5, 0.0, 0.0]


def slow_ties(changes: list[Array], density: float, weight: float) -> Array:
    """Element by element, as the paper's algorithm 1 says it."""
    kept = []
    for change in changes:
        count = max(1, round(density * change.size))
        least = sorted(np.abs(change).ravel())[-count]
        kept.append(np.where(np.abs(change) >= least, change, 0.0))
    result = np.zeros_like(changes[0])
    for place in np.ndindex(*result.shape):
        values = [change[place] for change in kept]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == sign]
        result[place] = weight * np.mean(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_ties_is_what_a_slow_reference_gives(count: int, density: float) -> None:
    changes = draw(count)
    thresholds = [find_threshold(lambda change=change: change.split(2), density) for change in changes]
    found = elect_changes(iter(changes), thresholds, 0.7)
    # sums of five numbers in float32
    np.testing.assert_allclose(found.numpy(), slow_ties(exact(changes), density, 0.7), rtol=0, atol=1e-6)


def test_a_threshold_is_of_the_whole_tensor_however_it_is_cut() -> None:
    values = draw(1, seed=4)[0] * 10.0 ** torch.arange(-9, 2)  # sizes of eleven magnitudes
    values[0, :3] = 0
    for density in (0.001, 0.1, 0.5, 0.93, 1.0):
        expected = sorted(values.abs().flatten().tolist())[-max(1, round(density * values.numel()))]
        assert {find_threshold(lambda rows=rows: values.split(rows), density) for rows in (1, 3, 7)} == {expected}


def test_task_arithmetic_and_the_mean_are_sums() -> None:
    changes = draw(3)
    np.testing.assert_allclose(sum_changes(iter(changes), 0.4).numpy(), 0.4 * sum(exact(changes)), rtol=0, atol=1e-6)
    # of three changed models and one that has not
    np.testing.assert_allclose(average_changes(iter(changes), 4).numpy(), sum(exact(changes)) / 4, rtol=0, atol=1e-6)


def test_sums_leave_the_changes_alone() -> None:
    changes = draw(2)
    before = [change.clone() for change in changes]
    sum_changes(changes, 2.0)
    elect_changes(changes, [0.1, 0.1], 2.0)
    assert all(torch.equal(change, old) for change, old in zip(changes, before, strict=True))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_keeps_the_expectation(density: float) -> None:
    change = torch.full((1000, 1000), 0.3)
    found = drop_elements(change, density, torch.Generator().manual_seed(5))
    assert set(found.unique().tolist()) <= {0.0, float(torch.tensor(0.3) / density)}
    # four standard errors of a mean of a million draws
    spread = 0.3 * ((1 - density) / density) ** 0.5 / 1000
    assert abs(float(found.mean(dtype=torch.float64)) - 0.3) <= 4 * spread + 1e-7
    assert abs(float((found != 0).double().mean()) - density) <= 4 * (density * (1 - density)) ** 0.5 / 1000


def test_no_change_leaves_the_very_bits() -> None:
    base = torch.tensor([-0.0, 1e-45, 3.4e38, 0.1])
    assert torch.equal(apply_change(base, torch.zeros(4)).view(torch.int32), base.view(torch.int32))
    assert apply_change(base, torch.ones(4))[0] == 1
