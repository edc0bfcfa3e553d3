"""Qwen2 and Qwen2-MoE: biases of query, key and value; a shared expert."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, SharedExpert
from dense2moe.upcycle.models.decoder import (
    EXPERTS,
    FFN,
    FIELDS,
    FIELDS_WITHOUT_ROPE,
    MLP,
    OUTSIDE,
    QUERY_KEY_VALUE_BIASES,
    ROUTER,
    WHOLE_ROTARY,
    WIDTH,
    WINDOW_FIELDS,
    attention_layer,
    dense_decoder,
    head_dim,
    shared_expert,
    sparse_layers,
)
from dense2moe.upcycle.models.glm4_moe import GLM4_MOE, NO_WINDOWS, glm4_moe_fields
from dense2moe.upcycle.models.heads import generic_heads
from dense2moe.upcycle.models.parts import Matrix


def configured_gate(config: Any) -> Gate:
    """A softmax whose chosen weights sum to 1 where `norm_topk_prob` says so."""
    return Gate(config.num_experts, TopK(config.num_experts_per_tok), renormalize=config.norm_topk_prob)


def _window_by_layer(config: Any, layer: int) -> int | None:
    return int(config.sliding_window) if config.layer_types[layer] == "sliding_attention" else None


QWEN2 = dense_decoder(
    "qwen2",
    "Qwen2ForCausalLM",
    {**attention_layer(QUERY_KEY_VALUE_BIASES), **FFN},
    heads=generic_heads("transformer."),
)
QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(
        attention_layer(QUERY_KEY_VALUE_BIASES),
        FFN,
        ROUTER,
        EXPERTS,
        shared_expert("shared_expert"),
        {"shared_scale": Matrix(f"{MLP}shared_expert_gate.weight")},
    ),
    experts=Experts(
        count_field="num_experts",
        top_k_field="num_experts_per_tok",
        width_field="moe_intermediate_size",
        gate=configured_gate,
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1},
        partial_layers="list",
        shared=SharedExpert("shared_expert_intermediate_size", required=True),
    ),
    heads=generic_heads(),
    rotary="Qwen2MoeRotaryEmbedding",
    window=_window_by_layer,
)


def unwindowed_fields(config: Any) -> dict[str, Any]:
    """Qwen2-MoE's fields without windows and without biases."""
    return {
        "qkv_bias": False,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "head_dim": head_dim(config),
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 0,
    }


def windowed_fields(config: Any) -> dict[str, Any]:
    """Qwen2-MoE's fields for a source with one window or none.

    Qwen2-MoE says for each layer whether it has a window.
    """
    if config.sliding_window is None:
        return unwindowed_fields(config)
    return {
        **unwindowed_fields(config),
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": ["sliding_attention"] * config.num_hidden_layers,
    }


CONVERSIONS = (
    Conversion(
        QWEN2,
        QWEN2_MOE,
        carried=(*FIELDS, *WINDOW_FIELDS),
        conditions=(WHOLE_ROTARY,),
        derived=lambda _: {"qkv_bias": True},
        consumed=WIDTH,
        optional=("head_dim",),
    ),
    Conversion(
        QWEN2,
        GLM4_MOE,
        carried=FIELDS_WITHOUT_ROPE,
        conditions=(WHOLE_ROTARY, NO_WINDOWS),
        derived=lambda c: {**glm4_moe_fields(c), "attention_bias": True},
        consumed=(*WIDTH, "rope_parameters", *WINDOW_FIELDS),
        by_name_alone=True,
    ),
)
