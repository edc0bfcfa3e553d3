"""Tokens are chosen as asked: greedy, or by the probabilities that are left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dense2moe.export.runtime.sampling import Sampling, choose_tokens, draw_uniforms

EVEN = (np.arange(20_000) + 0.5) / 20_000
"""Uniform numbers at equal distances: the share of each token is its probability, give or take two steps of 5e-5."""


def shares(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """The share of each token that evenly spaced numbers draw."""
    rows = np.repeat(np.array([logits], np.float32), len(EVEN), axis=0)
    tokens, counts = np.unique(choose_tokens(rows, sampling, EVEN), return_counts=True)
    return dict(zip(tokens.tolist(), (counts / len(EVEN)).tolist(), strict=True))


LOGITS = [np.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {1: 1.0}),
        (Sampling(temperature=1.0), {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (Sampling(temperature=0.5), {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),  # squares of the shares
        (Sampling(temperature=1.0, top_k=2), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_k=9), {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (Sampling(temperature=1.0, top_p=0.35), {1: 1.0}),
        (Sampling(temperature=1.0, top_p=0.65), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_p=0.75), {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        # of the best three, the best two hold 7/9
        (
            Sampling(temperature=1.0, top_k=3, top_p=0.75),
            {1: 4 / 7, 3: 3 / 7},
        ),
        (Sampling(temperature=1.0, top_p=0.0), {1: 1.0}),
        (Sampling(temperature=1.0, min_p=0.6), {1: 4 / 7, 3: 3 / 7}),  # of the likeliest one's 0.4 at least 0.24
        # after the temperature, which makes 9 of 16 of three quarters
        (
            Sampling(temperature=0.5, min_p=0.6),
            {1: 1.0},
        ),
        (Sampling(temperature=1.0, top_k=3, min_p=0.5), {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(sampling: Sampling, expected: dict[int, float]) -> None:
    found = shares(LOGITS, sampling)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_nucleus_whose_tokens_hold_just_its_share_has_no_more(top_p: float, count: int) -> None:
    found = shares([0.0] * 4, Sampling(temperature=1.0, top_p=top_p))
    assert found == pytest.approx(dict.fromkeys(range(count), 1 / count), abs=1e-4)


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution asked for, by a loop over the tokens from the likeliest down."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: sampling.top_k or None]
    weights = {token: np.exp((float(logits[token]) - float(logits.max())) / sampling.temperature) for token in order}
    kept: dict[int, float] = {}
    for token in order:
        if sum(kept.values()) >= sampling.top_p * sum(weights.values()) and kept:
            break
        kept[token] = weights[token]
    found = np.zeros(len(logits))
    found[list(kept)] = list(kept.values())
    return found / found.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("top_k", [0, 1, 17])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_of_a_seed_follow_the_distribution(top_k: int, top_p: float, ties: bool) -> None:
    """Pearson's statistic of 8000 draws.

    For n degrees of freedom it has the mean n and the deviation sqrt(2 n), and 4 of them are granted.
    """
    sampling = Sampling(temperature=1.3, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(5).normal(scale=2.0, size=60).astype(np.float32)
    if ties:
        logits = logits.round()
    expected = probabilities(logits, sampling)
    uniforms = draw_uniforms([[3, 1, 4]], 7, 8000)[:, 0]
    counts = np.bincount(choose_tokens(np.repeat(logits[None], 8000, axis=0), sampling, uniforms), minlength=60)
    assert set(counts.nonzero()[0]) <= set(expected.nonzero()[0])
    possible = expected > 0
    statistic = ((counts - 8000 * expected)[possible] ** 2 / (8000 * expected[possible])).sum()
    freedom = possible.sum() - 1
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom)


def test_each_row_is_drawn_by_itself() -> None:
    random = np.random.default_rng(0)
    logits, uniforms = random.normal(scale=3.0, size=(5, 200)).astype(np.float32), random.random(5)
    for sampling in (
        Sampling(),
        Sampling(1.0),
        Sampling(1.0, top_k=7),
        Sampling(1.0, top_p=0.7),
        Sampling(1.0, top_k=30, top_p=0.7),
    ):
        alone = [choose_tokens(logits[row : row + 1], sampling, uniforms[row : row + 1])[0] for row in range(5)]
        assert choose_tokens(logits, sampling, uniforms).tolist() == alone


def test_the_first_of_equal_logits_is_the_larger_one() -> None:
    assert shares([1.0, 2.0, 2.0], Sampling()) == {1: 1.0}
    assert shares([1.0, 2.0, 2.0], Sampling(temperature=1.0, top_k=1)) == {1: 1.0}
    assert shares([2.0, 2.0, 2.0, 2.0], Sampling(temperature=1.0, top_p=0.5)) == {0: 0.5, 1: 0.5}


def test_large_logits_overflow_nothing() -> None:
    assert shares([-1e30, 1e30, 3e38], Sampling(temperature=0.7)) == {2: 1.0}
    assert shares([-3e38, 3e38], Sampling(temperature=0.1)) == {1: 1.0}
    assert shares([1.0, 3.0, 2.0], Sampling(temperature=1e-60)) == {1: 1.0}


def test_numbers_depend_on_the_seed_and_the_prompt_alone() -> None:
    together = draw_uniforms([[5, 6], [7], [5, 6]], 3, 10)
    assert together.shape == (10, 3)
    np.testing.assert_array_equal(together[:, :1], draw_uniforms([[5, 6]], 3, 10))
    np.testing.assert_array_equal(together[:4, 1:2], draw_uniforms([[7]], 3, 4))
    assert len(set(together[0])) == 3
    assert draw_uniforms([[7]], 4, 1) != draw_uniforms([[7]], 3, 1)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=30, top_p=0.9, min_p=0.02), Sampling(1.4, min_p=0.1)]
)
def test_what_is_drawn_is_what_transformers_would_draw(sampling: Sampling, penalty: float) -> None:
    """Its processors, in the order in which its `generate` applies them."""
    random = np.random.default_rng(1)
    logits = random.normal(scale=3.0, size=(1, 50)).astype(np.float32)
    text = random.integers(0, 50, (1, 20))
    seen = np.isin(np.arange(50), text)[None]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    if sampling.temperature:
        processors += [
            TemperatureLogitsWarper(sampling.temperature),
            TopPLogitsWarper(sampling.top_p),
            MinPLogitsWarper(sampling.min_p),
        ]
        processors[2:2] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    scores = processors(torch.from_numpy(text), torch.from_numpy(logits))[0].double()
    expected = scores.softmax(-1).numpy() if sampling.temperature else np.eye(50)[int(scores.argmax())]
    drawn = choose_tokens(
        np.repeat(logits, len(EVEN), 0),
        replace(sampling, repetition_penalty=penalty),
        EVEN,
        np.repeat(seen, len(EVEN), 0),
    )
    assert np.bincount(drawn, minlength=50) / len(EVEN) == pytest.approx(expected, abs=1e-4)
