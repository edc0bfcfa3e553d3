"""Text as blocks of token ids, [N, S]."""

from __future__ import annotations

import torch


def choose_blocks(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the blocks at most, and one at least, taken evenly from the whole."""
    count = max(1, min(count, len(blocks)))
    return blocks[torch.arange(count) * len(blocks) // count]
