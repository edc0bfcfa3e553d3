"""GLM-4-MoE: a sigmoid gate with a selection bias, and a shared expert."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Condition, Experts, SharedExpert
from dense2moe.upcycle.models.decoder import (
    EXPERTS,
    FFN,
    HEAD_NORMS,
    MLP,
    OUTSIDE,
    QUERY_KEY_VALUE_BIASES,
    ROUTER,
    attention_layer,
    head_dim,
    shared_expert,
    sparse_layers,
)
from dense2moe.upcycle.models.parts import Matrix


def _gate(config: Any) -> Gate:
    return Gate(
        config.n_routed_experts,
        TopK(config.num_experts_per_tok),
        "sigmoid",
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        selection_bias=True,
    )


def _refusal(config: Any) -> str | None:
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        return f"partial_rotary_factor is {rotated:g}; the builder rotates whole heads"
    if config.n_group != 1:
        return f"n_group is {config.n_group}; the builder chooses among all experts at once"
    return None


GLM4_MOE = Architecture(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(
        attention_layer((*QUERY_KEY_VALUE_BIASES, *HEAD_NORMS)),
        FFN,
        ROUTER,
        {"selection_bias": Matrix(f"{MLP}gate.e_score_correction_bias")},
        EXPERTS,
        shared_expert("shared_experts"),
    ),
    experts=Experts(
        count_field="n_routed_experts",
        top_k_field="num_experts_per_tok",
        width_field="moe_intermediate_size",
        gate=_gate,
        fixed={
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        },
        partial_layers="last",
        shared=SharedExpert("n_shared_experts", required=True, in_experts=True),
        min_experts=2,  # its gate ranks groups of experts, of which there is one, by the two best scores in each
    ),
    rotary="Glm4MoeRotaryEmbedding",
    refusal=_refusal,
)

NO_WINDOWS = Condition(
    lambda c: "sliding_attention" not in c.layer_types,
    lambda c: (
        f"layer_types has {c.layer_types.count('sliding_attention')} layers with a window; Glm4MoeForCausalLM needs "
        "none: it has no windows"
    ),
)


def glm4_moe_fields(config: Any) -> dict[str, Any]:
    """GLM-4-MoE's fields for a source that rotates whole heads.

    It rotates half of each head unless its rotary parameters say otherwise.
    """
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    return {"rope_parameters": rope, "head_dim": head_dim(config), "attention_bias": False, "use_qk_norm": False}
