"""Ernie 4.5 and its mixture: interleaved rotary embeddings, and a selection bias."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, Required, SharedExpert
from dense2moe.upcycle.models.decoder import (
    EXPERTS,
    FFN,
    FIELDS,
    MLP,
    OUTSIDE,
    ROUTER,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    shared_expert,
    sparse_layers,
)
from dense2moe.upcycle.models.parts import Matrix

_LAYER = attention_layer()


def _gate(config: Any) -> Gate:
    return Gate(config.moe_num_experts, TopK(config.moe_k), selection_bias=True)


ERNIE4_5 = dense_decoder("ernie4_5", "Ernie4_5ForCausalLM", {**_LAYER, **FFN})
ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(
        _LAYER,
        FFN,
        ROUTER,
        {"selection_bias": Matrix(f"{MLP}moe_statics.e_score_correction_bias", as_row=True)},
        EXPERTS,
        shared_expert("shared_experts"),
    ),
    experts=Experts(
        count_field="moe_num_experts",
        top_k_field="moe_k",
        width_field="moe_intermediate_size",
        gate=_gate,
        fixed={"moe_norm_min": 1e-12, "use_bias": False},
        partial_layers="interval",
        shared=SharedExpert("moe_num_shared_experts", in_experts=True),
    ),
)

CONVERSIONS = (
    Conversion(
        ERNIE4_5,
        ERNIE4_5_MOE,
        carried=(*(name for name in FIELDS if name != "attention_dropout"), "head_dim"),
        required={"use_bias": Required(False, "no mixture-of-experts architecture of transformers has expert biases")},
        conditions=(WHOLE_ROTARY,),
        consumed=WIDTH,
    ),
)
