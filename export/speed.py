"""Tokens per second of a package, at batch 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.runtime import Decoder


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a prefill and of decoding after it; 0 where the context has no room for a token after the prompt."""

    prefill: float
    decode: float

    def request_seconds(self, num_prompt_tokens: int, num_new_tokens: int) -> float:
        """How long a request takes."""
        return num_prompt_tokens / self.prefill + (num_new_tokens / self.decode if self.decode else 0.0)


def measure_speeds(decoders: Mapping[str, Decoder], prompt: Sequence[int], num_new_tokens: int, num_rounds: int = 3) -> dict[str, Speed]:
    """Speeds of several packages that take turns: medians of `num_rounds` after one to warm up.

    A prompt that leaves no room for the new tokens is cut. After it its own tokens follow once more, so that routers see different ones.
    """
    context = min(decoder.context_length for decoder in decoders.values())
    num_prompt = max(1, min(len(prompt), context - num_new_tokens))
    num_new = min(num_new_tokens, context - num_prompt)
    ids = np.array([prompt[:num_prompt]], np.int64)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(num_rounds + 1):
        for name, decoder in decoders.items():
            cache = decoder.new_cache(1, num_prompt + num_new)
            started = time.perf_counter()
            decoder.run(cache, ids, logits_to_keep=1)
            middle = time.perf_counter()
            for step in range(num_new):
                at = step % num_prompt
                decoder.run(cache, ids[:, at : at + 1])
            rounds[name].append((middle - started, time.perf_counter() - middle))
    prefill, decode = ({name: statistics.median(pair[n] for pair in pairs[1:]) for name, pairs in rounds.items()} for n in (0, 1))
    return {name: Speed(num_prompt / prefill[name], num_new / decode[name] if num_new else 0.0) for name in decoders}
