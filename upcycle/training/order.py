"""The order of blocks: every epoch shuffled anew, drawn when reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch


class BlockOrder(Sequence[int]):
    """Indices of blocks in training order, epoch after epoch."""

    def __init__(self, num_blocks: int, size: int, seed: int, first: int = 0) -> None:
        self.num_blocks, self.size, self.seed, self.first = num_blocks, size, seed, first
        self._epoch = -1
        self._generator = torch.Generator()
        self._places = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> BlockOrder: ...
    def __getitem__(self, index: int | slice) -> int | BlockOrder:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.size)
            assert step == 1
            return BlockOrder(self.num_blocks, max(0, stop - start), self.seed, self.first + start)
        if not 0 <= index < self.size:
            raise IndexError(index)
        epoch, place = divmod(self.first + index, self.num_blocks)
        if epoch < self._epoch or self._epoch < 0:
            self._generator.manual_seed(self.seed)
            self._epoch = -1
        while self._epoch < epoch:
            self._places = torch.randperm(self.num_blocks, generator=self._generator)
            self._epoch += 1
        return int(self._places[place])


def draw_order(num_blocks: int, count: int, seed: int) -> BlockOrder:
    """The order of `count` blocks by a seed."""
    return BlockOrder(num_blocks, count, seed)
