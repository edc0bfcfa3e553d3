"""Tokens per second of a package, at batch 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
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


def measure_speed(decoder: Decoder, prompt: Sequence[int], num_new_tokens: int, num_rounds: int = 3) -> Speed:
    """Speed of a package: medians of `num_rounds` after one to warm up.

    A prompt that leaves no room for the new tokens is cut. After it its own tokens follow once more, so that routers see different ones.
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
