"""Dense families without a sparse twin in transformers, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NoTwin:
    """Why no sparse architecture holds a dense family, and the nearest."""

    reason: str
    nearest: str | None = None


_UNGATED = NoTwin("LayerNorm, and an FFN with biases and without a gate")
_ENCODER = NoTwin("a bidirectional encoder with an ungated FFN with biases")
NO_TWIN: Mapping[str, NoTwin] = {
    "gemma4_text": NoTwin("norms on both sides of the FFN, and layers that share keys and values", "qwen3_moe"),
    "diffllama": NoTwin("differential attention", "mixtral"),
    "bitnet": NoTwin("norms inside attention and FFN, and weights of three values", "mixtral"),
}
"""Families that users ask for, by their model_type."""


NO_TARGET: Mapping[str, str] = {
    "dbrx": "its logits equal OLMo's in float32 alone, and differ by 2e-2 in bfloat16 and 2e-3 in float16, as it "
    "rounds the cosines of rotary embeddings; and without clip_qkv it fails",
    "nllb-moe": "whatever its routers say, it sends every token to experts 0 and 1",
}
"""Sparse architectures that a dense family could become, and why none does; measured with transformers 5.23."""


@dataclass(frozen=True)
class Trait:
    """A property that no target has, and config fields that show it."""

    fields: tuple[str, ...]
    reason: str


TRAITS: tuple[Trait, ...] = (
    Trait(("vision_config", "audio_config", "text_config"), "parts that read images or sound beside the text model"),
    Trait(("kv_lora_rank",), "latent attention"),
    Trait(("attn_logit_softcapping", "final_logit_softcapping"), "soft caps on attention scores or logits"),
    Trait(
        (
            "state_size",
            "ssm_state_size",
            "mamba_d_state",
            "mamba_d_ssm",
            "lru_width",
            "linear_conv_kernel_dim",
            "conv_L_cache",
            "mlstm_round_up_to_multiple_of",
        ),
        "layers of a state space, a recurrence or a convolution",
    ),
    Trait(("parallel_attn", "use_parallel_residual"), "attention and FFN in parallel"),
    Trait(("alibi",), "ALiBi positions"),
    Trait(("no_rope_layers", "no_rope_layer_interval"), "layers without rotary embeddings"),
    Trait(("attention_chunk_size",), "attention within chunks"),
    Trait(("is_encoder_decoder",), "an encoder"),
    Trait(("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), "LayerNorm"),
)
"""Properties by which a family is refused that no table names."""
