"""Facts about model families: what each dense one becomes.

A family says which mixture-of-experts architecture of transformers can hold it, where every tensor goes and what happens to every field of its
config. A field that bears on the forward pass is carried, or must have the one value that the target can express, or the run is refused;
`tests/test_family.py` checks that every field of the config class is classified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from upcycle.errors import UpcycleError


@dataclass(frozen=True)
class Required:
    """A config value that the target cannot express otherwise, and the reason in words."""

    value: Any
    reason: str


@dataclass(frozen=True)
class FfnNames:
    """Tensor names of one gated FFN, with `{layer}`, and of its experts, with `{layer}` and `{expert}`."""

    gate: str
    up: str
    down: str
    expert_gate: str
    expert_up: str
    expert_down: str
    router: str
    router_norm: str  # the norm whose output the router reads; its scale sets the size of the logits


@dataclass(frozen=True)
class Family:
    """One row of the table: a dense architecture and its native mixture-of-experts target."""

    model_type: str
    architecture: str
    target_model_type: str
    target_architecture: str
    ffn: FfnNames
    kept: tuple[str, ...]  # tensors that keep their names; `{layer}` where one a layer
    dropped: tuple[str, ...]  # tensors that old checkpoints carry and no forward pass reads
    carried: tuple[str, ...]  # config fields with the same name and meaning on both sides
    required: Mapping[str, Required]
    neutral: tuple[str, ...]  # config fields that no forward pass of the target reads
    expert_count_field: str = "num_local_experts"
    target_defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    target_model_type="mixtral",
    target_architecture="MixtralForCausalLM",
    ffn=FfnNames(
        gate="model.layers.{layer}.mlp.gate_proj.weight",
        up="model.layers.{layer}.mlp.up_proj.weight",
        down="model.layers.{layer}.mlp.down_proj.weight",
        expert_gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        expert_up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        expert_down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        router_norm="model.layers.{layer}.post_attention_layernorm.weight",
    ),
    kept=(
        "model.embed_tokens.weight",
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ),
    dropped=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    carried=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "attention_dropout",
        "rope_parameters",
    ),
    required={
        "attention_bias": Required(False, "Mixtral's attention has no biases"),
        "mlp_bias": Required(False, "no mixture-of-experts architecture of transformers has expert biases with Llama's FFN"),
        "pretraining_tp": Required(1, "tensor-parallel slices change the order of sums"),
    },
    neutral=(),
    target_defaults={"sliding_window": None, "router_jitter_noise": 0.0},
)

FAMILIES: tuple[Family, ...] = (_LLAMA,)

# Fields of every PreTrainedConfig: bookkeeping, generation defaults and class labels, none read by a decoder's forward pass.
COMMON_NEUTRAL = frozenset({
    "_name_or_path", "architectures", "transformers_version", "dtype", "model_type", "output_hidden_states", "output_attentions", "return_dict",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "_from_model_config",
})  # fmt: skip


def find_family(model_type: str, architectures: list[str] | None) -> Family:
    """The family of a config.

    Raises:
        UpcycleError: no family covers it; names what is supported.
    """
    for family in FAMILIES:
        if family.model_type == model_type and (not architectures or family.architecture in architectures):
            return family
    named = f"{architectures[0]} ({model_type})" if architectures else model_type
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UpcycleError(f"config.json: {named} cannot be upcycled; supported: {supported}")
