"""Slices that several checkpoints share, merged as the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

import torch

from dense2moe.upcycle.building.merging import apply_change, average_changes
from dense2moe.upcycle.building.pieces import Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import read_chunks


class Merger:
    """Merges the sources' slices into the base's, chunk by chunk.

    Held at once are a chunk of the base and one of a source, and what the method adds up; so memory grows neither with
    the model nor with the number of sources.
    """

    def __init__(self, checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan) -> None:
        self._base, *self._sources = checkpoints
        self._method = plan.settings.merging.method
        self._num_models = len(self._sources) + (plan.settings.base_expert != "none")

    def merge(self, rows: Slice) -> Iterator[torch.Tensor]:
        """The merged slice, float32, in chunks of a few million elements."""
        others = [self._read(source, rows) for source in self._sources]
        for chunk in self._read(self._base, rows):
            base = chunk.to(torch.float32)
            changes = (next(other).to(torch.float32).sub_(base) for other in others)
            yield apply_change(base, self._combine(changes))

    def _combine(self, changes: Iterator[torch.Tensor]) -> torch.Tensor:
        match self._method:
            case "mean":
                return average_changes(changes, self._num_models)
            case "base":
                raise AssertionError("the plan keeps the base's slices, and merges none")
            case _:
                assert_never(self._method)

    @staticmethod
    def _read(checkpoint: Checkpoint, rows: Slice) -> Iterator[torch.Tensor]:
        return read_chunks(checkpoint.entries[rows.source], rows.start, rows.stop)
