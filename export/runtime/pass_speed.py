"""Rows and tokens a second of a package without a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.runtime.single_pass import SinglePass, Tensors
from dense2moe.export.runtime.speed import Speed
from dense2moe.upcycle.progress import Progress


@dataclass(frozen=True)
class PassLoad:
    """A load of one pass: rows, and tokens or samples of each.

    `length` is None where a graph reads rows of one size only, as images are.
    """

    batch_size: int
    length: int | None


@dataclass(frozen=True)
class PassTime:
    """Seconds of a load's pass in every round."""

    load: PassLoad
    seconds: tuple[float, ...]


def time_passes(package: SinglePass, loads: Sequence[PassLoad], num_rounds: int, progress: Progress) -> list[PassTime]:
    """Seconds of every load, after one round to warm up.

    In a round each load has its turn. Inputs are drawn by a fixed seed.

    Raises:
        ExportError: a load is longer than the model's context.
    """
    context = package.context_length
    too_long = next((load.length for load in loads if load.length is not None and load.length > context), None)
    if too_long is not None:
        raise ExportError(f"rows of {too_long} tokens; the model's context holds {context}; ask for fewer")
    found: dict[PassLoad, list[float]] = {load: [] for load in loads}
    generator = torch.Generator().manual_seed(0)
    for turn in range((num_rounds + 1) * len(loads)):
        progress("timing", turn, (num_rounds + 1) * len(loads))
        load = loads[turn % len(loads)]
        given = package.draw_inputs(load.batch_size, load.length, generator)
        started = time.perf_counter()
        package.run(given)
        found[load].append(time.perf_counter() - started)
    progress("timing", (num_rounds + 1) * len(loads), (num_rounds + 1) * len(loads))
    return [PassTime(load, tuple(found[load][1:])) for load in loads]


def measure_passes(package: SinglePass, given: Tensors, num_tokens: int, num_rounds: int = 3) -> Speed:
    """Tokens per second of a pass that reads `num_tokens`.

    The median of `num_rounds` after one to warm up; nothing is decoded.
    """
    seconds: Sequence[float] = []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        package.run(given)
        seconds = [*seconds, time.perf_counter() - started]
    return Speed(num_tokens / statistics.median(seconds[1:]), 0.0)
