"""Matrices that a checkpoint keeps turned, read by their rows.

A Conv1D of transformers (GPT-2) keeps [in, out]; a row of it is what one input gives to all outputs. Everything else,
and every graph, is judged by rows of what one output reads. A filter of a convolution that is one element wide in some
direction [out, in, 1] or [out, 1, width] is a matrix without that direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dense2moe.upcycle.checkpoints.tensors import TensorEntry, read_chunks, read_tensor


@dataclass(frozen=True)
class Turned(TensorEntry):
    """A tensor [out, in] that lies in its file as [in, out]."""


def turn(entry: TensorEntry) -> Turned:
    """A matrix that lies in its file as [in, out]."""
    return Turned(**{**vars(entry), "shape": entry.shape[::-1]})


def squeeze(shape: Sequence[int]) -> tuple[int, ...]:
    """A filter's shape without directions of one element.

    Any other shape as it is.
    """
    kept = tuple(size for size in shape if size != 1)
    return kept if len(shape) > 2 and min(shape[-2:]) == 1 and len(kept) > 1 else tuple(shape)


def read_pieces(entry: TensorEntry, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """Rows `start` to `stop` of a tensor, in pieces."""
    if not isinstance(entry, Turned):
        yield from read_chunks(entry, start, stop)
        return
    as_it_lies = replace(entry, shape=entry.shape[::-1])
    yield read_tensor(as_it_lies).T[start:stop].contiguous()
