"""How much text calibration reads: as much as the widths of experts need."""

from __future__ import annotations

from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from export.config import QuantizeConfig
from export.text import count_calibration_tokens


def test_calibration_reads_four_tokens_for_each_input_of_an_expert_that_has_its_share() -> None:
    auto = QuantizeConfig()
    real = MixtralConfig(hidden_size=576, intermediate_size=1536, num_local_experts=4, num_experts_per_tok=2)
    assert count_calibration_tokens(auto, real) == 4 * 1536 * 2
    fine = Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=256, intermediate_size=3072, num_experts=16, num_experts_per_tok=8)
    assert count_calibration_tokens(auto, fine) == 8192, "no less than that"
    large = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2)
    assert count_calibration_tokens(auto, large) == 32768, "no more than that"
    assert count_calibration_tokens(auto, LlamaConfig(hidden_size=576, intermediate_size=2560)) == 4 * 2560
    assert count_calibration_tokens(QuantizeConfig(calibration_tokens=100), real) == 100
