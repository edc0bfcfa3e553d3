"""Tokens per second of a package, by batch and length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense2moe.export.errors import ExportError
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.upcycle.progress import Progress


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a prefill and of decoding after it.

    0 where the context has no room for a token after the prompt.
    """

    prefill: float
    decode: float

    def request_seconds(self, num_prompt_tokens: int, num_new_tokens: int) -> float:
        """Seconds that a request takes."""
        return num_prompt_tokens / self.prefill + (num_new_tokens / self.decode if self.decode else 0.0)


def measure_speed(decoder: Decoder, prompt: Sequence[int], num_new_tokens: int, num_rounds: int = 3) -> Speed:
    """Speed of a package: medians of `num_rounds` after one to warm up.

    A prompt that leaves no room for the new tokens is cut. After it its own tokens follow once more, so that routers
    see different ones.
    """
    num_prompt = max(1, min(len(prompt), decoder.context_length - num_new_tokens))
    num_new = min(num_new_tokens, decoder.context_length - num_prompt)
    ids = np.array([prompt[:num_prompt]], np.int64)
    prefills, decodes = [], []
    for _ in range(num_rounds + 1):
        cache = decoder.new_cache(1, num_prompt + num_new)
        started = time.perf_counter()
        decoder.run(cache, ids, logits_to_keep=1)
        middle = time.perf_counter()
        for step in range(num_new):
            at = step % num_prompt
            decoder.run(cache, ids[:, at : at + 1])
        prefills.append(middle - started)
        decodes.append(time.perf_counter() - middle)
    prefill, decode = (statistics.median(seconds[1:]) for seconds in (prefills, decodes))
    return Speed(num_prompt / prefill, num_new / decode if num_new else 0.0)


@dataclass(frozen=True)
class Load:
    """A load to time: prompts, tokens of each, new tokens of each."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class LoadTime:
    """Seconds of a load in every round.

    Of the prefill, and of all its decode steps together; and the bytes of its KV cache.
    """

    load: Load
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    cache_bytes: int


def time_loads(decoder: Decoder, loads: Sequence[Load], num_rounds: int, progress: Progress) -> list[LoadTime]:
    """Seconds of every load, after one round to warm up.

    In a round each load has its turn, so that a machine that slows down slows all alike. Tokens are drawn evenly from
    the vocabulary by a fixed seed, so that the experts of a mixture all have work. Only the last token of a prompt has
    logits, where the graph can leave out the others.

    Raises:
        ExportError: a load is longer than the model's context.
    """
    for load in loads:
        if (total := load.prompt_tokens + load.new_tokens) > decoder.context_length:
            raise ExportError(
                f"{load.prompt_tokens} tokens and {load.new_tokens} new ones are {total}; the model's context holds "
                f"{decoder.context_length}; "
                "ask for fewer"
            )
    draw = np.random.default_rng(0)
    prefills: dict[Load, list[float]] = {load: [] for load in loads}
    decodes: dict[Load, list[float]] = {load: [] for load in loads}
    cache_bytes = {}
    for turn in range((num_rounds + 1) * len(loads)):
        progress("timing", turn, (num_rounds + 1) * len(loads))
        load = loads[turn % len(loads)]
        length = load.prompt_tokens + load.new_tokens
        ids = draw.integers(0, decoder.vocab_size, (load.batch_size, length), np.int64)
        cache = decoder.new_cache(load.batch_size, length)
        started = time.perf_counter()
        decoder.run(cache, ids[:, : load.prompt_tokens], logits_to_keep=1)
        middle = time.perf_counter()
        for place in range(load.prompt_tokens, length):
            decoder.run(cache, ids[:, place : place + 1])
        decodes[load].append(time.perf_counter() - middle)
        prefills[load].append(middle - started)
        cache_bytes[load] = sum(buffer.numpy().nbytes for buffer in cache.buffers.values())
    progress("timing", (num_rounds + 1) * len(loads), (num_rounds + 1) * len(loads))
    return [LoadTime(load, tuple(prefills[load][1:]), tuple(decodes[load][1:]), cache_bytes[load]) for load in loads]
