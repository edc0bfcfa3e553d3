"""Blocks of token ids, chosen evenly."""

from __future__ import annotations

import torch


def choose_blocks(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the blocks, evenly spread; at least one."""
    return blocks[choose_places(len(blocks), count)]


def choose_places(total: int, count: int) -> list[int]:
    """Indices of at most `count` of `total` things, evenly spread.

    One index at least.
    """
    count = max(1, min(count, total))
    return [place * total // count for place in range(count)]
