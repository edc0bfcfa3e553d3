"""Text as token ids, of its own or in blocks [N, S]."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from export.config import QuantizeConfig

_TOKENS_PER_INPUT = 4  # twice what GPTQ needs, for experts that are visited less than others
_FEWEST_TOKENS, _MOST_TOKENS = 8192, 32768


def count_calibration_tokens(config: QuantizeConfig, model: PreTrainedConfig) -> int:
    """Tokens that calibration reads at most, as the settings or the widths of the model's experts say."""
    if config.calibration_tokens != "auto":
        return config.calibration_tokens
    num_experts = max(1, *(int(getattr(model, name, None) or 1) for name in ("num_local_experts", "num_experts", "n_routed_experts")))
    width = max(int(getattr(model, "moe_intermediate_size", None) or model.intermediate_size), int(model.hidden_size))
    share = num_experts / max(1, int(getattr(model, "num_experts_per_tok", None) or num_experts))
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, math.ceil(_TOKENS_PER_INPUT * width * share)))


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
