"""Tokens per second of an encoder and a decoder."""

from __future__ import annotations

import statistics
import time

import numpy as np

from dense2moe.export.runtime.encoder_decoder import EncoderDecoder
from dense2moe.export.runtime.single_pass import Tensors
from dense2moe.export.runtime.speed import Speed


def measure_writing(
    package: EncoderDecoder, given: Tensors, num_read: int, num_new_tokens: int, num_rounds: int = 3
) -> Speed:
    """Tokens per second that are read, and that are written after them.

    The first written token counts as reading: it makes the keys and values of what was read. Medians of `num_rounds`
    after one to warm up.
    """
    num_new = max(1, min(num_new_tokens, package.context_length - 1))
    tokens = np.random.default_rng(0).integers(0, package.vocab_size, (1, 1 + num_new))
    reads, writes = [], []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        decoding = package.encode(given)
        package.run(decoding, tokens[:, :1])
        middle = time.perf_counter()
        for place in range(1, 1 + num_new):
            package.run(decoding, tokens[:, place : place + 1])
        reads.append(middle - started)
        writes.append(time.perf_counter() - middle)
    read, written = (statistics.median(seconds[1:]) for seconds in (reads, writes))
    return Speed(num_read / read, num_new / written)
