"""Encoded examples of a split: tensors, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Encoded:
    """Tensors of a split, its real tokens, and cut examples.

    longest: tokens of the longest. image_tokens: positions of an image, 0 of texts. longest_answer: tokens of the
    longest answer to a question.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int
    num_cut: int
    longest: int
    image_tokens: int = 0
    longest_answer: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


def pad(rows: Sequence[Sequence[int]], length: int, filling: int) -> torch.Tensor:
    """Rows of numbers, filled on the right; int32 [rows, length]."""
    return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows], dtype=torch.int32)
