"""The number of tokens that calibration reads."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from dense2moe.export.quantization.config import QuantizeConfig

_TOKENS_PER_INPUT = 4  # twice what GPTQ needs, for experts that are visited less than others
_FEWEST_TOKENS, _MOST_TOKENS = 8192, 32768


def count_calibration_tokens(config: QuantizeConfig, model: PreTrainedConfig) -> int:
    """The most calibration tokens, by settings or experts' widths."""
    if config.calibration_tokens != "auto":
        return config.calibration_tokens
    num_experts = max(
        1, *(int(getattr(model, name, None) or 1) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    )
    width = max(int(getattr(model, "moe_intermediate_size", None) or model.intermediate_size), int(model.hidden_size))
    share = num_experts / max(1, int(getattr(model, "num_experts_per_tok", None) or num_experts))
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, math.ceil(_TOKENS_PER_INPUT * width * share)))
