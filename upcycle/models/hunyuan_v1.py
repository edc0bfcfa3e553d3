"""HunYuan v1 and its mixture: norms behind the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, SharedExpert
from dense2moe.upcycle.models.decoder import (
    BIASES,
    EXPERTS,
    FFN,
    FIELDS,
    LAYER,
    MLP,
    OUTSIDE,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    shared_expert,
    sparse_layers,
)
from dense2moe.upcycle.models.parts import Matrix, Part

_LAYER: Mapping[Part, Matrix] = {
    **attention_layer(BIASES),
    "query_norm": Matrix(f"{LAYER}self_attn.query_layernorm.weight"),
    "key_norm": Matrix(f"{LAYER}self_attn.key_layernorm.weight"),
}

HUNYUAN_V1_DENSE = dense_decoder("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", {**_LAYER, **FFN})
HUNYUAN_V1_MOE = Architecture(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(_LAYER, {"router": Matrix(f"{MLP}gate.wg.weight")}, EXPERTS, shared_expert("shared_mlp")),
    experts=Experts(
        count_field="num_experts",
        top_k_field="moe_topk",
        width_field="intermediate_size",
        gate=lambda c: Gate(c.num_experts, TopK(c.moe_topk)),
        fixed={},
        shared=SharedExpert(width_field=None, required=True),
    ),
)

CONVERSIONS = (
    Conversion(
        HUNYUAN_V1_DENSE,
        HUNYUAN_V1_MOE,
        carried=(*FIELDS, "attention_bias", "head_dim", "eod_token_id", "pretraining_tp"),
        conditions=(WHOLE_ROTARY,),
        consumed=WIDTH,
    ),
)
