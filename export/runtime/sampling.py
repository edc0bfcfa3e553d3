"""The choice of the next token: greedy, top-k, nucleus or min-p sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy.

    repetition_penalty: what the logits of tokens that are in the text already are divided by, or multiplied where they
    are negative (Keskar et al. 2019, section 4.1). min_p: the least probability of a token that may be drawn, as a
    share of the likeliest one's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def draw_uniforms(prompts: Sequence[Sequence[int]], seed: int, num_steps: int) -> Doubles:
    """A number in [0, 1) for each step and prompt, [num_steps, B].

    They depend on the seed and the prompt, and not on the batch around it; equal prompts get different ones, the first
    those of the prompt alone.
    """
    before = [prompts[:row].count(prompt) for row, prompt in enumerate(prompts)]
    streams = [np.random.default_rng([seed, count, *prompt]) for count, prompt in zip(before, prompts, strict=True)]
    return np.stack([stream.random(num_steps) for stream in streams], axis=1)


def choose_tokens(logits: Floats, sampling: Sampling, uniforms: Doubles, seen: Bools | None = None) -> Ints:
    """The next token [B] of each row of logits [B, V].

    Greedy at temperature 0, else a draw from the softmax of the likeliest. Those are the top-k of them, then the top-p
    (nucleus) of these, then those of min_p or more. A draw is the token at which the running sum of the probabilities
    passes the row's number of uniforms [B]. Of equal logits the first is larger. `seen` [B, V] marks the tokens of each
    text so far, for the repetition penalty. Order: transformers' `_get_logits_processor` (generation/utils.py, 5.23).
    """
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = np.float32(sampling.repetition_penalty)
        logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        greedy: Ints = logits.argmax(axis=1)
        return greedy
    if not 0 < sampling.top_k < logits.shape[1]:
        return _draw(logits, sampling, uniforms)
    best_BK = _top_k(logits, sampling.top_k)
    places = _draw(np.take_along_axis(logits, best_BK, axis=1), sampling, uniforms)
    return best_BK[np.arange(len(best_BK)), places]


def _draw(logits: Floats, sampling: Sampling, uniforms: Doubles) -> Ints:
    temperature = np.float32(max(sampling.temperature, 1e-30))  # less would be zero in float32
    with np.errstate(over="ignore"):  # of differences beyond float32, which are -inf and get no mass
        scaled_BV = (logits - logits.max(axis=1, keepdims=True)) / temperature
    mass: Floats = np.exp(scaled_BV)
    if sampling.top_p < 1:
        mass = np.where(_nucleus(mass, sampling.top_p), mass, np.float32(0))
    if sampling.min_p > 0:
        mass = np.where(mass < sampling.min_p, np.float32(0), mass)  # the likeliest one's is 1
    running_BV = mass.cumsum(axis=1, dtype=np.float64)
    drawn: Ints = (running_BV > uniforms[:, None] * running_BV[:, -1:]).argmax(axis=1)
    return drawn


def _top_k(logits: Floats, k: int) -> Ints:
    """Indices [B, k] of each row's k largest logits, ascending.

    Logits are [B, V].
    """
    size = logits.shape[1]
    threshold_B1 = np.partition(logits, size - k, axis=1)[:, size - k, None]
    flat: Ints = np.flatnonzero(_largest(logits, threshold_B1, np.full((len(logits), 1), k)))
    best: Ints = flat.reshape(-1, k) % size
    return best


def _nucleus(mass: Floats, top_p: float) -> Bools:
    """Each row's nucleus: the fewest tokens with probability `top_p`.

    One token at least. Masses below (1 - top_p) / V of the row's hold less than 1 - top_p of it all together, so only
    the others are sorted.
    """
    size = mass.shape[1]
    total_B1 = mass.sum(axis=1, dtype=np.float64, keepdims=True)
    num_sorted = max(1, int((mass >= (1 - top_p) / size * total_B1).sum(axis=1).max()))
    descending_BN = np.sort(np.partition(mass, size - num_sorted, axis=1)[:, size - num_sorted :], axis=1)[:, ::-1]
    before_BN = descending_BN.cumsum(axis=1, dtype=np.float64) - descending_BN
    count_B1 = np.maximum((before_BN < top_p * total_B1).sum(axis=1, keepdims=True), 1)
    return _largest(mass, np.take_along_axis(descending_BN, count_B1 - 1, axis=1), count_B1)


def _largest(values: Floats, threshold: Floats, count: Ints) -> Bools:
    """Each row's `count` [B, 1] largest values, given the least of them.

    All above it, and the first of those that equal it.
    """
    reached_BV: Bools = values >= threshold
    excess_B1 = reached_BV.sum(axis=1, keepdims=True) - count
    if not excess_B1.any():
        return reached_BV
    equal_BV = values == threshold
    room_B1 = equal_BV.sum(axis=1, keepdims=True) - excess_B1
    last_BV: Bools = equal_BV & (equal_BV.cumsum(axis=1) > room_B1)
    return reached_BV & ~last_BV
