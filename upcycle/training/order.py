"""The order of blocks: every epoch shuffled anew, drawn when reached.

Padded examples of about the same length share a batch, so that little padding is computed: the shuffled examples of an
epoch are taken a pool of batches at a time, a pool is sorted by length, and its batches are shuffled. Which examples
a pool has, and when a batch comes, is left to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

_POOL = 50  # batches


@dataclass(frozen=True)
class Grouping:
    """What brings examples together.

    lengths: of the examples, int64 [N].
    """

    lengths: torch.Tensor
    batch_size: int

    def arrange(self, places: torch.Tensor, num_before: int, generator: torch.Generator) -> torch.Tensor:
        """An epoch's shuffled places [N], in batches of like lengths.

        `num_before` examples were met before this epoch: its first ones fill a batch that has begun, and stay, as do
        the last, which begin a batch that the next epoch fills.
        """
        begun = min(-num_before % self.batch_size, len(places))
        first, rest = places[:begun], places[begun:]
        whole = len(rest) - len(rest) % self.batch_size
        pools = (self._sort(pool, generator) for pool in rest[:whole].split(_POOL * self.batch_size))
        return torch.cat([first, *pools, rest[whole:]])

    def _sort(self, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batches = pool[self.lengths[pool].argsort(stable=True)].view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()


class BlockOrder(Sequence[int]):
    """Indices of blocks in training order, epoch after epoch."""

    def __init__(self, num_blocks: int, size: int, seed: int, grouping: Grouping | None = None, first: int = 0) -> None:
        self.num_blocks, self.size, self.seed, self.grouping, self.first = num_blocks, size, seed, grouping, first
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
            return BlockOrder(self.num_blocks, max(0, stop - start), self.seed, self.grouping, self.first + start)
        if not 0 <= index < self.size:
            raise IndexError(index)
        epoch, place = divmod(self.first + index, self.num_blocks)
        if epoch < self._epoch or self._epoch < 0:
            self._generator.manual_seed(self.seed)
            self._epoch = -1
        while self._epoch < epoch:
            self._epoch += 1
            self._places = torch.randperm(self.num_blocks, generator=self._generator)
            if self.grouping is not None:
                self._places = self.grouping.arrange(self._places, self._epoch * self.num_blocks, self._generator)
        return int(self._places[place])


def draw_order(num_blocks: int, count: int, seed: int, grouping: Grouping | None = None) -> BlockOrder:
    """The order of `count` blocks by a seed, grouped where asked for."""
    return BlockOrder(num_blocks, count, seed, grouping)
