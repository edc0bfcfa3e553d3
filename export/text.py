"""Text as token ids, of its own or in blocks [N, S]."""

from __future__ import annotations

from typing import Any

import torch


def choose_blocks(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the blocks at most, and one at least, taken evenly from the whole."""
    return blocks[choose_places(len(blocks), count)]


def choose_places(total: int, count: int) -> list[int]:
    """The places of `count` of `total` things at most, and of one at least, taken evenly."""
    count = max(1, min(count, total))
    return [place * total // count for place in range(count)]


def start_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, after the token that starts one where the tokenizer knows it."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is None or ids[:1] == [tokenizer.bos_token_id]:
        return ids
    return [tokenizer.bos_token_id, *ids]
