"""OLMo 2 and FlexOlmo: norms after attention and FFN."""

from __future__ import annotations

from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts
from dense2moe.upcycle.models.decoder import (
    BIASES,
    EXPERTS,
    FFN,
    FIELDS,
    HEAD_NORMS,
    OUTSIDE,
    ROUTER,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    sparse_layers,
)
from dense2moe.upcycle.models.qwen2 import configured_gate

_LAYER = attention_layer((*BIASES, *HEAD_NORMS), norms_after=True)
OLMO2 = dense_decoder("olmo2", "Olmo2ForCausalLM", {**_LAYER, **FFN})
FLEX_OLMO = Architecture(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(_LAYER, ROUTER, EXPERTS),
    experts=Experts(
        count_field="num_experts",
        top_k_field="num_experts_per_tok",
        width_field="intermediate_size",
        gate=configured_gate,
        fixed={"norm_topk_prob": True},
    ),
    rotary="FlexOlmoRotaryEmbedding",
    norm_per_head=False,
)

CONVERSIONS = (
    Conversion(
        OLMO2,
        FLEX_OLMO,
        carried=(*FIELDS, "attention_bias"),
        conditions=(WHOLE_ROTARY,),
        consumed=WIDTH,
        optional=("head_dim",),
    ),
)
