"""A flip of an 8-bit rounding is explained, and an error of the same size that is none is not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dense2moe.export.parity.inside.flips import RoundedFfn, RoundedProduct, find_near, near_middle
from dense2moe.export.quantization.simulation import BlockRounding, EightBits, StaticRounding

WIDTH, INNER, BLOCK, TOKENS = 32, 48, 16, 6
ROUNDINGS: dict[str, tuple[EightBits, EightBits]] = {
    "by block": (BlockRounding(BLOCK), BlockRounding(BLOCK)),
    "static": (StaticRounding(1.0), StaticRounding(4.0)),
}
"""Of what a product or an FFN reads, and inside of the FFN."""
LIMIT = 1e-5
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, WIDTH, generator=GENERATOR)
UP, GATE = (torch.randn(INNER, WIDTH, generator=GENERATOR) / 8 for _ in range(2))
DOWN = torch.randn(WIDTH, INNER, generator=GENERATOR)


@pytest.fixture(params=ROUNDINGS)
def rounding(request: pytest.FixtureRequest) -> EightBits:
    return ROUNDINGS[request.param][0]


def draw(places: list[tuple[int, int]], seed: int = 1) -> torch.Tensor:
    """Inputs [T, K] that lie between two integers at these places and near them nowhere.

    Each block's largest number is 127 steps of 1, and so are static steps.
    """
    x = (torch.rand(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 200 - 100).round() + 0.2
    x[:, ::BLOCK] = 127.0
    for token, column in places:
        x[token, column] = x[token, column].floor() + 0.5
    return x


def flip(x: torch.Tensor, rounding: EightBits, token: int, column: int, steps: float = 1.0) -> torch.Tensor:
    """The rounded inputs, where one of them is another integer."""
    rounded = rounding(x).clone()
    away = 1.0 if rounded[token, column] <= x[token, column] else -1.0
    rounded[token, column] += away * steps
    return rounded


def explained(
    x: torch.Tensor, rounding: EightBits, found: torch.Tensor, expected: torch.Tensor, factor: float = 1.0
) -> dict[int, float]:
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    rows = (errors > LIMIT).nonzero()[:, 0]
    return dict(
        RoundedProduct(x, WEIGHT, rounding, factor).explain(rows, found[rows].double(), expected[rows].double(), LIMIT)
    )


def test_numbers_between_two_integers_are_found_with_their_step() -> None:
    x = draw([(1, 3), (4, 20)])
    x[4] *= 0.25  # steps are of each block
    places, steps, integers = find_near(x, BlockRounding(BLOCK), "given")
    assert places.tolist() == [[1, 3], [4, 20]]
    assert [float(steps[1, 3]), float(steps[4, 20])] == [1.0, 0.25]
    assert float(integers[1, 3]) % 1 == float(integers[4, 20]) % 1 == 0.5
    factors = torch.linspace(0.5, 2, WIDTH)
    places, steps, _ = find_near(draw([(1, 3), (4, 20)]) * factors, BlockRounding(BLOCK, factors), "given")
    assert places.tolist() == [[1, 3], [4, 20]]
    assert torch.allclose(steps[1], factors)


def test_a_block_of_zeros_has_no_step_and_nothing_near() -> None:
    assert find_near(torch.zeros(2, WIDTH), BlockRounding(BLOCK), "given")[0].tolist() == []


def test_static_steps_are_alike_everywhere_and_end_at_the_last_integers() -> None:
    x = torch.tensor([[0.74, 0.75, -64.25, -63.75, 63.25, 63.75, 1e9]])
    places, steps, _ = find_near(x, StaticRounding(0.5), "given")
    assert places.tolist() == [[0, 1], [0, 3], [0, 4]]  # -128.5 and 127.5 are the last integers either way
    assert steps.tolist() == [[0.5] * 7]
    unsigned = StaticRounding(0.5, lowest=-3, highest=252)  # zero point 3
    assert find_near(torch.tensor([[-1.75, -1.25, 125.75, 126.25]]), unsigned, "given")[0].tolist() == [[0, 1], [0, 2]]


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_flip_is_explained(rounding: EightBits, factor: float) -> None:
    x = draw([(1, 3), (4, 20)])
    expected = rounding(x) @ WEIGHT.T * factor
    for token, column in ((1, 3), (4, 20)):
        found = flip(x, rounding, token, column) @ WEIGHT.T * factor
        errors = explained(x, rounding, found, expected, factor)
        assert set(errors) == {token}
        assert errors[token] < 1e-6


def test_two_flips_of_one_token_are_explained(rounding: EightBits) -> None:
    x = draw([(2, 3), (2, 20), (2, 30)])
    rounded = flip(x, rounding, 2, 3)
    rounded[2, 30] = flip(x, rounding, 2, 30)[2, 30]
    assert set(explained(x, rounding, rounded @ WEIGHT.T, rounding(x) @ WEIGHT.T)) == {2}


def test_an_error_of_the_size_of_a_flip_is_no_flip(rounding: EightBits) -> None:
    x = draw([(1, 3)])
    expected = rounding(x) @ WEIGHT.T
    size = (flip(x, rounding, 1, 3) @ WEIGHT.T - expected)[1].norm()
    for seed in range(20):
        direction = torch.randn(len(WEIGHT), generator=torch.Generator().manual_seed(seed))
        found = expected.clone()
        found[1] += size * direction / direction.norm()
        assert explained(x, rounding, found, expected) == {}


def test_a_flip_of_a_number_that_is_near_no_middle_is_an_error(rounding: EightBits) -> None:
    x = draw([(1, 3)])
    expected = rounding(x) @ WEIGHT.T
    assert explained(x, rounding, flip(x, rounding, 1, 5) @ WEIGHT.T, expected) == {}
    assert explained(x, rounding, flip(x, rounding, 2, 3) @ WEIGHT.T, expected) == {}
    two_steps = flip(x, rounding, 1, 3, steps=2.0) @ WEIGHT.T
    assert explained(x, rounding, two_steps, expected) == {}


def test_a_flip_beside_an_error_is_an_error_and_so_is_what_is_no_number(rounding: EightBits) -> None:
    x = draw([(1, 3)])
    expected = rounding(x) @ WEIGHT.T
    found = flip(x, rounding, 1, 3) @ WEIGHT.T
    found[1] += 1e-3 * expected[1]
    assert explained(x, rounding, found, expected) == {}
    found[1, 0] = torch.nan
    assert explained(x, rounding, found, expected) == {}
    assert (
        dict(
            RoundedProduct(x, WEIGHT, rounding, 1.0).explain(
                torch.tensor([1]), found[1:2].double(), expected[1:2].double(), LIMIT
            )
        )
        == {}
    )


# Inside a gated FFN.


@dataclass(frozen=True)
class Gated:
    """An FFN that rounds what it reads, and what its last matrix reads."""

    first: EightBits
    last: EightBits

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        rounded = self.first(x)
        return F.silu(rounded @ GATE.T / WIDTH) * (rounded @ UP.T)

    def run(self, rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """What it gives, and what flips of its second rounding may add to each row."""
        inner = self.inner(rows)
        return self.last(inner) @ DOWN.T, near_middle(inner, DOWN, self.last, "inner")

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, torch.arange(len(x)))[0]

    def explain(self, x: torch.Tensor, found: torch.Tensor, factor: float = 1.0, beside: float = 0.0) -> set[int]:
        """Rows that flips explain, where a place shows so many times the FFN's output, and something beside it."""
        expected = self.output(x) * factor + beside
        rows = ((found - expected).norm(dim=-1) > LIMIT * expected.norm(dim=-1)).nonzero()[:, 0]
        ffn = RoundedFfn(x, self.run, (self.first,), factor)
        return set(dict(ffn.explain(rows, found[rows].double(), expected[rows].double(), LIMIT)))


@pytest.fixture(params=ROUNDINGS)
def ffn(request: pytest.FixtureRequest) -> Gated:
    return Gated(*ROUNDINGS[request.param])


def test_a_flip_inside_an_ffn_is_explained_and_another_error_is_not(ffn: Gated) -> None:
    drawn = (draw([], seed) for seed in range(50))
    x = next(x for x in drawn if len(find_near(ffn.inner(x), ffn.last, "inner")[0]))
    places, steps, numbers = find_near(ffn.inner(x), ffn.last, "inner")
    token, column = places[0].tolist()
    distance = (numbers - numbers.floor() - 0.5).abs()
    found = ffn.output(x)
    found[token] += DOWN[:, column] * steps[token, column]
    assert ffn.explain(x, found) == {token}
    far = int(distance[token].argmax())
    found = ffn.output(x)
    found[token] += DOWN[:, far] * steps[token, far]
    assert ffn.explain(x, found) == set()


@pytest.mark.parametrize(("factor", "beside"), [(1.0, 0.0), (0.5, 7.0)])
def test_a_flip_of_an_ffn_s_input_is_tried(ffn: Gated, factor: float, beside: float) -> None:
    x = draw([(3, 5), (3, 21)])
    for columns in ([5], [21], [5, 21]):
        moved = x.clone()
        for column in columns:
            moved[3, column] += 0.25 if ffn.first(x)[3, column] < x[3, column] else -0.25
        assert not torch.equal(ffn.first(x)[3], ffn.first(moved)[3])
        assert ffn.explain(x, ffn.output(moved) * factor + beside, factor, beside) == {3}
    wrong = x.clone()
    wrong[3, 7] += 1.0
    assert ffn.explain(x, ffn.output(wrong) * factor + beside, factor, beside) == set()
