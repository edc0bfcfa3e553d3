"""Noise and redrawn neurons have the size that was asked for, touch nothing else, and depend on seed and name alone."""

from __future__ import annotations

import pytest
import torch

from dense2moe.upcycle.building.experts import (
    ElementMoments,
    add_noise,
    choose_neurons,
    measure_moments,
    redraw_neurons,
    seeded_generator,
)


def weight_of(rows: int, columns: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * std + mean


# Moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("std", "mean"), [(0.02, 0.0), (1.0, 1.0), (3.0, 7.0)])
@pytest.mark.parametrize("rows_a_chunk", [1, 7, 64])
def test_moments_of_chunks_are_those_of_the_whole_weight(
    dtype: torch.dtype, std: float, mean: float, rows_a_chunk: int
) -> None:
    weight = weight_of(64, 33, std, mean).to(dtype)
    found = measure_moments(weight.split(rows_a_chunk))
    # Squares are rounded in float32 before they are summed, by 6e-8 of the mean square at most, which is 4e-7 of the
    # last of these variances.
    assert found.mean == pytest.approx(float(weight.double().mean()), rel=1e-6, abs=1e-6 * std)
    assert found.std == pytest.approx(float(weight.double().std(correction=0)), rel=1e-5)


def test_moments_of_two_numbers_are_known() -> None:
    assert measure_moments([torch.tensor([1.0]), torch.tensor([[5.0]])]) == ElementMoments(3.0, 2.0)


def test_a_constant_weight_has_no_deviation() -> None:
    found = measure_moments([torch.full((3, 5), 0.1), torch.full((2, 5), 0.1)])
    assert found.std <= 0.1 * 2**-12  # the root of what rounding a square in float32 leaves


@pytest.mark.parametrize("chunks", [[], [torch.empty(0, 4)]])
def test_a_weight_without_elements_has_moments_of_zero(chunks: list[torch.Tensor]) -> None:
    assert measure_moments(chunks) == ElementMoments(0.0, 0.0)


# Noise


@pytest.mark.parametrize("relative_std", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("std", [0.02, 3.0])
def test_noise_is_relative_to_the_deviation_that_is_given(relative_std: float, std: float) -> None:
    weight = weight_of(256, 128, mean=0.5)  # whose own deviation is not asked: it may be a chunk of a larger weight
    noise = add_noise(weight, relative_std, std, seeded_generator(0, "a")) - weight
    # 32768 draws: the standard errors of deviation and mean are .4 % and .6 % of the deviation.
    assert float(noise.std()) == pytest.approx(relative_std * std, rel=0.02)
    assert abs(float(noise.mean())) < 0.03 * relative_std * std


def test_no_noise_is_the_very_tensor() -> None:
    weight = torch.ones(2, 2)
    assert add_noise(weight, 0.0, 1.0, seeded_generator(0, "a")) is weight


def test_noise_leaves_its_input_as_it_was() -> None:
    weight = weight_of(3, 4)
    before = weight.clone()
    found = add_noise(weight, 0.5, 1.0, seeded_generator(0, "a"))
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert torch.equal(weight, before)
    assert (found != weight).all()


# Which neurons


@pytest.mark.parametrize(
    ("num_neurons", "share", "chosen"),
    [(64, 0.5, 32), (48, 0.25, 12), (10, 0.0, 0), (3, 0.5, 2), (7, 0.9, 6), (100, 0.004, 0)],
)
def test_the_nearest_whole_number_of_neurons_is_chosen(num_neurons: int, share: float, chosen: int) -> None:
    mask = choose_neurons(num_neurons, share, seeded_generator(0, "a"))
    assert mask.dtype == torch.bool
    assert mask.shape == (num_neurons,)
    assert int(mask.sum()) == chosen


def test_every_neuron_is_chosen_as_often_as_any_other() -> None:
    masks = torch.stack([choose_neurons(20, 0.3, seeded_generator(seed, "neurons")) for seed in range(2000)])
    # Of 2000 draws with probability .3, a neuron's share has a standard error of 1 %; twenty of them lie within four of
    # it.
    assert torch.allclose(masks.float().mean(0), torch.full((20,), 0.3), atol=0.04)


# Redrawing


@pytest.mark.parametrize("axis", [0, 1])
def test_redrawn_neurons_have_the_moments_given_and_the_others_their_bits(axis: int) -> None:
    weight = weight_of(200, 200, std=5.0)
    mask = choose_neurons(200, 0.5, seeded_generator(0, "neurons"))
    found = redraw_neurons(weight, mask, axis, ElementMoments(0.7, 0.02), seeded_generator(0, "a"))
    kept, drawn = (found[~mask], found[mask]) if axis == 0 else (found[:, ~mask], found[:, mask])
    assert torch.equal(kept, weight[~mask] if axis == 0 else weight[:, ~mask])
    # 20000 draws: the standard errors are .5 % of the deviation for it and .7 % of it for the mean.
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.03 * 0.02)
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.02)
    # each its own draw, not one row again and again; some float32 values occur twice
    assert drawn.unique().numel() > 0.99 * drawn.numel()


@pytest.mark.parametrize("axis", [0, 1])
def test_redrawing_leaves_its_input_as_it_was(axis: int) -> None:
    weight = weight_of(4, 4)
    before = weight.clone()
    redraw_neurons(
        weight, torch.tensor([True, False, True, False]), axis, ElementMoments(0.0, 1.0), seeded_generator(0, "a")
    )
    assert torch.equal(weight, before)


def test_redrawing_nothing_is_the_very_tensor() -> None:
    weight = torch.ones(2, 2)
    assert (
        redraw_neurons(weight, torch.zeros(2, dtype=torch.bool), 0, ElementMoments(0.0, 1.0), seeded_generator(0, "a"))
        is weight
    )


# Generators


def test_generators_differ_by_seed_and_by_name() -> None:
    keys = [(0, "a"), (0, "b"), (1, "a"), (11, "a"), (1, "1a")]
    draws = {key: tuple(torch.rand(4, generator=seeded_generator(*key)).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert draws[0, "a"] == tuple(torch.rand(4, generator=seeded_generator(0, "a")).tolist())


def test_the_global_generator_has_no_part_in_what_is_drawn() -> None:
    def draw(global_seed: int) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            weight, mask = torch.ones(4, 4), choose_neurons(4, 0.5, seeded_generator(0, "a"))
            noisy = add_noise(weight, 1.0, 1.0, seeded_generator(0, "b"))
            return [mask, noisy, redraw_neurons(weight, mask, 0, ElementMoments(0.0, 1.0), seeded_generator(0, "c"))]

    assert all(torch.equal(one, other) for one, other in zip(draw(1), draw(2), strict=True))
