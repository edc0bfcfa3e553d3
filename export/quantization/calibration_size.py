"""The number of tokens that calibration reads."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.upcycle.footprint import find_inner_width
from dense2moe.upcycle.models.routing import assume_gate

_TOKENS_PER_INPUT = 4  # twice what GPTQ needs, for experts that are visited less than others
_FEWEST_TOKENS, _MOST_TOKENS = 8192, 32768


def count_calibration_tokens(config: QuantizeConfig, model: PreTrainedConfig) -> int:
    """The most calibration tokens, by settings or experts' widths."""
    if config.calibration_tokens != "auto":
        return config.calibration_tokens
    gate = assume_gate(model)
    width = max(find_inner_width(model), int(model.hidden_size))
    share = 1.0 if gate is None else gate.num_experts / gate.max_experts_per_token
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, math.ceil(_TOKENS_PER_INPUT * width * share)))
