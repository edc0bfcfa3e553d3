"""Blocks of token ids, chosen evenly."""

from __future__ import annotations

import torch


def choose_blocks(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the blocks at most, and one at least, taken evenly from the whole."""
    return blocks[choose_places(len(blocks), count)]


def choose_places(total: int, count: int) -> list[int]:
    """The places of `count` of `total` things at most, and of one at least, taken evenly."""
    count = max(1, min(count, total))
    return [place * total // count for place in range(count)]
