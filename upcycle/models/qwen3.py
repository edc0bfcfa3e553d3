"""Qwen3 and Qwen3-MoE: norms of each head's query and key."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.models.architecture import Architecture, Condition, Conversion, Experts
from dense2moe.upcycle.models.decoder import (
    BIASES,
    EXPERTS,
    FFN,
    FIELDS,
    FIELDS_WITHOUT_ROPE,
    HEAD_NORMS,
    NO_OUTPUT_BIAS,
    OUTSIDE,
    ROUTER,
    WHOLE_ROTARY,
    WIDTH,
    WINDOW_FIELDS,
    attention_layer,
    dense_decoder,
    one_window,
    sparse_layers,
)
from dense2moe.upcycle.models.glm4_moe import GLM4_MOE, NO_WINDOWS, glm4_moe_fields
from dense2moe.upcycle.models.heads import generic_heads
from dense2moe.upcycle.models.qwen2 import configured_gate

_LAYER = attention_layer((*BIASES, *HEAD_NORMS))
_HEADS = generic_heads("transformer.")
QWEN3 = dense_decoder("qwen3", "Qwen3ForCausalLM", {**_LAYER, **FFN}, heads=_HEADS)
QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(_LAYER, FFN, ROUTER, EXPERTS),
    experts=Experts(
        count_field="num_local_experts",
        top_k_field="num_experts_per_tok",
        width_field="moe_intermediate_size",
        gate=configured_gate,
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1},
        partial_layers="list",
    ),
    heads=_HEADS,
    rotary="Qwen3MoeRotaryEmbedding",
    window=one_window,
)

_ONE_KIND_OF_LAYER = Condition(
    lambda c: len(set(c.layer_types)) == 1,
    lambda c: (
        f"layer_types has {c.layer_types.count('sliding_attention')} layers with a window and others without; "
        "Qwen3MoeForCausalLM needs one kind: it has one window for all layers"
    ),
)


def _one_window_fields(config: Any) -> dict[str, Any]:
    window = config.sliding_window if "sliding_attention" in config.layer_types else None
    return {"use_sliding_window": window is not None, "sliding_window": window, "head_dim": config.head_dim}


CONVERSIONS = (
    Conversion(
        QWEN3,
        QWEN3_MOE,
        carried=(*FIELDS, "attention_bias"),
        conditions=(WHOLE_ROTARY, _ONE_KIND_OF_LAYER),
        derived=_one_window_fields,
        consumed=(*WIDTH, "head_dim", *WINDOW_FIELDS),
    ),
    Conversion(
        QWEN3,
        GLM4_MOE,
        carried=FIELDS_WITHOUT_ROPE,
        required={"attention_bias": NO_OUTPUT_BIAS},
        conditions=(WHOLE_ROTARY, NO_WINDOWS),
        derived=lambda c: {**glm4_moe_fields(c), "use_qk_norm": True},
        consumed=(*WIDTH, "head_dim", "rope_parameters", *WINDOW_FIELDS),
        by_name_alone=True,
    ),
)
