"""What is not finite has a name in JSON, and a perplexity whatever its loss."""

from __future__ import annotations

import json
import math

import pytest

from dense2moe.upcycle.numbers import name_specials
from dense2moe.upcycle.tasks.language import perplexity


@pytest.mark.parametrize("loss", [0.0, 1.5, 700.0])
def test_a_perplexity_is_e_to_the_loss(loss: float) -> None:
    assert perplexity(loss) == pytest.approx(math.e**loss, rel=1e-12)


def test_a_perplexity_beyond_float64_is_infinite_and_of_no_number_is_none() -> None:
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_names_are_what_pythons_json_writes() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert name_specials([{"a": (value, 1.5)}]) == [{"a": [json.dumps(value), 1.5]}]
    assert name_specials({"a": (1, 2.5, None, True, "NaN")}) == {"a": [1, 2.5, None, True, "NaN"]}
