"""Blocks of tokens, each with the domain that its text is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dense2moe.upcycle.data.blocks import read_blocks, read_domains
from dense2moe.upcycle.data.held_out import Split


@dataclass(frozen=True)
class Examples:
    """Blocks of token ids, and each block's domain number.

    They are int64, [blocks, block_size] and [blocks].
    """

    ids: torch.Tensor
    domains: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.ids.shape[1]

    def of_domain(self, number: int) -> Examples:
        """The blocks of one domain, in their order."""
        chosen = self.domains == number
        return Examples(self.ids[chosen], self.domains[chosen])

    def split(self, count: int) -> list[Examples]:
        """The same in parts of `count` blocks; the last may be smaller."""
        pairs = zip(self.ids.split(count), self.domains.split(count), strict=True)
        return [Examples(ids, domains) for ids, domains in pairs]


def read_examples(directory: Path, split: Split) -> Examples:
    """The blocks of a split that `prepare_data` wrote, with their domains.

    Raises:
        UpcycleError: there are none, or the file is damaged.
    """
    return Examples(read_blocks(directory, split), read_domains(directory, split)[1])
