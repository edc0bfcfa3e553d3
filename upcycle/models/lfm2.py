"""LFM2 and LFM2-MoE: short convolutions in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, Stack
from dense2moe.upcycle.models.decoder import LAYER, OUTSIDE, WHOLE_ROTARY, WIDTH, sparse_layers
from dense2moe.upcycle.models.parts import Matrix, Part

_FEED_FORWARD = f"{LAYER}feed_forward."
_NAMES: Mapping[Part, str] = {
    "attention_norm": "operator_norm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "attention_output": "self_attn.out_proj.weight",
    "query_norm": "self_attn.q_layernorm.weight",
    "key_norm": "self_attn.k_layernorm.weight",
    "convolution_input": "conv.in_proj.weight",
    "convolution_input_bias": "conv.in_proj.bias",
    "convolution_kernel": "conv.conv.weight",
    "convolution_kernel_bias": "conv.conv.bias",
    "convolution_output": "conv.out_proj.weight",
    "convolution_output_bias": "conv.out_proj.bias",
    "ffn_norm": "ffn_norm.weight",
}
_LAYER: Mapping[Part, Matrix] = {part: Matrix(f"{LAYER}{name}") for part, name in _NAMES.items()}
_OUTSIDE: Mapping[Part, Matrix] = {**OUTSIDE, "final_norm": Matrix("model.embedding_norm.weight")}
_FFN: Mapping[Part, Matrix] = {
    "ffn_gate": Matrix(f"{_FEED_FORWARD}w1.weight"),
    "ffn_up": Matrix(f"{_FEED_FORWARD}w3.weight"),
    "ffn_down": Matrix(f"{_FEED_FORWARD}w2.weight"),
}
_EXPERTS: Mapping[Part, Matrix] = {
    "expert_gate": Matrix(f"{_FEED_FORWARD}experts.{{expert}}.w1.weight"),
    "expert_up": Matrix(f"{_FEED_FORWARD}experts.{{expert}}.w3.weight"),
    "expert_down": Matrix(f"{_FEED_FORWARD}experts.{{expert}}.w2.weight"),
}


def _gate(config: Any) -> Gate:
    # it adds 1e-6 to the sum that weights are divided by, which shows where all chosen scores are near zero
    return Gate(
        config.num_experts,
        TopK(config.num_experts_per_tok),
        "sigmoid",
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        selection_bias=config.use_expert_bias,
    )


LFM2 = Architecture(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    task="text-generation",
    outside=_OUTSIDE,
    stacks=(Stack("num_hidden_layers", {**_LAYER, **_FFN}),),
    ffn_module="layers.{layer}.feed_forward",
)
LFM2_MOE = Architecture(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    task="text-generation",
    outside=_OUTSIDE,
    stacks=sparse_layers(
        _LAYER,
        _FFN,
        {
            "router": Matrix(f"{_FEED_FORWARD}gate.weight"),
            "selection_bias": Matrix(f"{_FEED_FORWARD}expert_bias"),
        },
        _EXPERTS,
    ),
    experts=Experts(
        count_field="num_experts",
        top_k_field="num_experts_per_tok",
        width_field="moe_intermediate_size",
        gate=_gate,
        fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        partial_layers="last",
        num_dense_field="num_dense_layers",
    ),
)

CONVERSIONS = (
    Conversion(
        LFM2,
        LFM2_MOE,
        carried=(
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "initializer_range",
            "norm_eps",
            "use_cache",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
            "rope_parameters",
            "conv_bias",
            "conv_L_cache",
            "layer_types",
        ),
        conditions=(WHOLE_ROTARY,),
        consumed=(
            *WIDTH,
            "block_multiple_of",
            "block_ffn_dim_multiplier",
            "block_auto_adjust_ff_dim",
            "full_attn_idxs",
        ),
        optional=("head_dim",),
        zero_router="rounding",  # it divides by the sum of the chosen scores and 1e-6 more
    ),
)
