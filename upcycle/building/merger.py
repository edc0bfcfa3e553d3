"""Slices that several checkpoints share, merged as the settings say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import assert_never

import torch

from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.merging import (
    apply_change,
    average_changes,
    drop_elements,
    elect_changes,
    find_threshold,
    sum_changes,
)
from dense2moe.upcycle.building.pieces import Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint


class Merger:
    """Merges the sources' slices into the base's, chunk by chunk.

    Held at once are a chunk of the base and one of a source, and what the method adds up; so memory grows neither with
    the model nor with the number of sources. The thresholds of TIES are of each source's slice by itself, which is a
    tensor or, of a fused one, a part of it; they are exact, and cost two more passes over the disk. DARE draws for each
    source and slice by the run's seed and their names, whatever the order of writing.
    """

    def __init__(self, checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int) -> None:
        self._base, *self._sources = checkpoints
        self._names, self._seed = plan.sources, seed
        self._settings = plan.settings.merging
        self._averaged = find_averaged(plan)

    def merge(self, rows: Slice) -> Iterator[torch.Tensor]:
        """The merged slice, float32, in chunks of a few million elements."""
        if self._settings.method in ("mean", "greedy-soup"):
            yield from average_slices((self._base, *self._sources), self._averaged, rows)
            return
        thresholds = self._find_thresholds(rows) if self._settings.method == "ties" else []
        generators = [
            seeded_generator(self._seed, f"dropped of {name} {rows.source} {rows.start}") for name in self._names
        ]
        others = [_read(source, rows) for source in self._sources]
        for chunk in _read(self._base, rows):
            base = chunk.to(torch.float32)
            changes = (next(other).to(torch.float32).sub_(base) for other in others)
            yield apply_change(base, self._combine(changes, thresholds, generators))

    def _combine(
        self, changes: Iterator[torch.Tensor], thresholds: list[float], generators: list[torch.Generator]
    ) -> torch.Tensor:
        settings = self._settings
        match settings.method:
            case "task-arithmetic":
                return sum_changes(changes, settings.factor)
            case "ties":
                return elect_changes(changes, thresholds, settings.factor)
            case "dare":
                dropped = (
                    drop_elements(change, settings.share, generator)
                    for change, generator in zip(changes, generators, strict=True)
                )
                return sum_changes(dropped, settings.factor)
            case "base" | "mean" | "greedy-soup":
                raise AssertionError(f"method {settings.method} combines no changes one by one")
            case _:
                assert_never(settings.method)

    def _find_thresholds(self, rows: Slice) -> list[float]:
        return [find_threshold(partial(self._changes, source, rows), self._settings.share) for source in self._sources]

    def _changes(self, source: Checkpoint, rows: Slice) -> Iterator[torch.Tensor]:
        for base, own in zip(_read(self._base, rows), _read(source, rows), strict=True):
            yield own.to(torch.float32).sub_(base.to(torch.float32))


def find_averaged(plan: UpcyclePlan) -> tuple[int, ...]:
    """Numbers of the checkpoints that are averaged, or may be.

    0 is the base, where it is an expert; of a greedy soup that is chosen, the chosen ones.
    """
    if plan.soup is not None:
        return plan.soup
    return tuple(range(plan.settings.base_expert == "none", len(plan.sources) + 1))


def average_slices(checkpoints: Sequence[Checkpoint], numbers: Sequence[int], rows: Slice) -> Iterator[torch.Tensor]:
    """The mean of some checkpoints' slices, float32, in chunks.

    The first checkpoint is the base, to which the mean change is added.
    """
    others = [_read(checkpoints[number], rows) for number in numbers if number > 0]
    for chunk in _read(checkpoints[0], rows):
        base = chunk.to(torch.float32)
        changes = (next(other).to(torch.float32).sub_(base) for other in others)
        yield apply_change(base, average_changes(changes, len(numbers))) if others else base


def _read(checkpoint: Checkpoint, rows: Slice) -> Iterator[torch.Tensor]:
    return checkpoint.read_chunks(rows.source, rows.start, rows.stop)
