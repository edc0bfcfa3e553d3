"""A flip of an 8-bit rounding is explained, and an error of the same size that is none is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense2moe.export.parity.inside.flips import RoundedFfn, RoundedProduct, find_near, near_middle
from dense2moe.export.quantization.simulation import BlockRounding

WIDTH, INNER, BLOCK, TOKENS = 32, 48, 16, 6
ROUNDING = BlockRounding(BLOCK)
LIMIT = 1e-5
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, WIDTH, generator=GENERATOR)
UP, GATE = (torch.randn(INNER, WIDTH, generator=GENERATOR) / 8 for _ in range(2))
DOWN = torch.randn(WIDTH, INNER, generator=GENERATOR)


def draw(places: list[tuple[int, int]], seed: int = 1) -> torch.Tensor:
    """Inputs [T, K] that lie between two integers at these places and near them nowhere.

    Each block's largest number is 127 steps of 1.
    """
    x = (torch.rand(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 200 - 100).round() + 0.2
    x[:, ::BLOCK] = 127.0
    for token, column in places:
        x[token, column] = x[token, column].floor() + 0.5
    return x


def flip(x: torch.Tensor, token: int, column: int, steps: float = 1.0) -> torch.Tensor:
    """The rounded inputs, where one of them is another integer."""
    rounded = ROUNDING(x).clone()
    away = 1.0 if rounded[token, column] <= x[token, column] else -1.0
    rounded[token, column] += away * steps
    return rounded


def explained(x: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, divisor: float = 1.0) -> dict[int, float]:
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    rows = (errors > LIMIT).nonzero()[:, 0]
    return dict(
        RoundedProduct(x, WEIGHT, ROUNDING, divisor).explain(rows, found[rows].double(), expected[rows].double(), LIMIT)
    )


def test_numbers_between_two_integers_are_found_with_their_step() -> None:
    x = draw([(1, 3), (4, 20)])
    x[4] *= 0.25  # steps are of each block
    places, steps, integers = find_near(x, ROUNDING, "given")
    assert places.tolist() == [[1, 3], [4, 20]]
    assert [float(steps[1, 3]), float(steps[4, 20])] == [1.0, 0.25]
    assert float(integers[1, 3]) % 1 == float(integers[4, 20]) % 1 == 0.5
    factors = torch.linspace(0.5, 2, WIDTH)
    places, steps, _ = find_near(draw([(1, 3), (4, 20)]) * factors, BlockRounding(BLOCK, factors), "given")
    assert places.tolist() == [[1, 3], [4, 20]]
    assert torch.allclose(steps[1], factors)


def test_a_block_of_zeros_has_no_step_and_nothing_near() -> None:
    assert find_near(torch.zeros(2, WIDTH), ROUNDING, "given")[0].tolist() == []


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_a_flip_is_explained(divisor: float) -> None:
    x = draw([(1, 3), (4, 20)])
    expected = ROUNDING(x) @ WEIGHT.T / divisor
    for token, column in ((1, 3), (4, 20)):
        found = flip(x, token, column) @ WEIGHT.T / divisor
        errors = explained(x, found, expected, divisor)
        assert set(errors) == {token}
        assert errors[token] < 1e-6


def test_two_flips_of_one_token_are_explained() -> None:
    x = draw([(2, 3), (2, 20), (2, 30)])
    rounded = flip(x, 2, 3)
    rounded[2, 30] = flip(x, 2, 30)[2, 30]
    assert set(explained(x, rounded @ WEIGHT.T, ROUNDING(x) @ WEIGHT.T)) == {2}


def test_an_error_of_the_size_of_a_flip_is_no_flip() -> None:
    x = draw([(1, 3)])
    expected = ROUNDING(x) @ WEIGHT.T
    size = (flip(x, 1, 3) @ WEIGHT.T - expected)[1].norm()
    for seed in range(20):
        direction = torch.randn(len(WEIGHT), generator=torch.Generator().manual_seed(seed))
        found = expected.clone()
        found[1] += size * direction / direction.norm()
        assert explained(x, found, expected) == {}


def test_a_flip_of_a_number_that_is_near_no_middle_is_an_error() -> None:
    x = draw([(1, 3)])
    expected = ROUNDING(x) @ WEIGHT.T
    assert explained(x, flip(x, 1, 5) @ WEIGHT.T, expected) == {}
    assert explained(x, flip(x, 2, 3) @ WEIGHT.T, expected) == {}
    assert explained(x, flip(x, 1, 3, steps=2.0) @ WEIGHT.T, expected) == {}  # and so is one of two steps


def test_a_flip_beside_an_error_is_an_error_and_so_is_what_is_no_number() -> None:
    x = draw([(1, 3)])
    expected = ROUNDING(x) @ WEIGHT.T
    found = flip(x, 1, 3) @ WEIGHT.T
    found[1] += 1e-3 * expected[1]
    assert explained(x, found, expected) == {}
    found[1, 0] = torch.nan
    assert explained(x, found, expected) == {}
    assert (
        dict(
            RoundedProduct(x, WEIGHT, ROUNDING, 1.0).explain(
                torch.tensor([1]), found[1:2].double(), expected[1:2].double(), LIMIT
            )
        )
        == {}
    )


# Inside a gated FFN.


def inner_of(x: torch.Tensor) -> torch.Tensor:
    rounded = ROUNDING(x)
    return F.silu(rounded @ GATE.T / WIDTH) * (rounded @ UP.T)


def run(rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The FFN, and what flips of its second rounding may add to each row."""
    inner = inner_of(rows)
    return ROUNDING(inner) @ DOWN.T, near_middle(inner, DOWN, ROUNDING, "inner")


def explain_ffn(x: torch.Tensor, found: torch.Tensor) -> dict[int, float]:
    expected = run(x, torch.arange(TOKENS))[0]
    rows = ((found - expected).norm(dim=-1) > LIMIT * expected.norm(dim=-1)).nonzero()[:, 0]
    return dict(RoundedFfn(x, run, ROUNDING).explain(rows, found[rows].double(), expected[rows].double(), LIMIT))


def test_a_flip_inside_an_ffn_is_explained_and_another_error_is_not() -> None:
    x = next(x for x in (draw([], seed) for seed in range(50)) if len(find_near(inner_of(x), ROUNDING, "inner")[0]))
    places, steps, integers = find_near(inner_of(x), ROUNDING, "inner")
    token, column = places[0].tolist()
    distance = (integers - integers.floor() - 0.5).abs()
    expected = run(x, torch.arange(TOKENS))[0]
    found = expected.clone()
    found[token] += DOWN[:, column] * steps[token, column]
    assert set(explain_ffn(x, found)) == {token}
    far = int(distance[token].argmax())
    found[token] = expected[token] + DOWN[:, far] * steps[token, far]
    assert explain_ffn(x, found) == {}


def test_a_flip_of_an_ffn_s_input_is_tried() -> None:
    x = draw([(3, 5), (3, 21)])
    for columns in ([5], [21], [5, 21]):
        moved = x.clone()
        for column in columns:
            moved[3, column] += 0.25 if ROUNDING(x)[3, column] < x[3, column] else -0.25
        assert not torch.equal(ROUNDING(x)[3], ROUNDING(moved)[3])
        assert set(explain_ffn(x, run(moved, torch.arange(TOKENS))[0])) == {3}
    wrong = x.clone()
    wrong[3, 7] += 1.0
    assert explain_ffn(x, run(wrong, torch.arange(TOKENS))[0]) == {}
