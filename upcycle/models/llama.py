"""Llama: what of it each target can hold."""

from __future__ import annotations

from dense2moe.upcycle.models.architecture import Conversion, Required
from dense2moe.upcycle.models.decoder import (
    BIASES,
    FFN,
    FIELDS,
    FIELDS_WITHOUT_ROPE,
    NO_MLP_BIAS,
    NO_OUTPUT_BIAS,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
)
from dense2moe.upcycle.models.glm4_moe import GLM4_MOE, glm4_moe_fields
from dense2moe.upcycle.models.granite import GRANITE_MOE, GRANITE_MOE_SHARED, plain_fields
from dense2moe.upcycle.models.heads import generic_heads
from dense2moe.upcycle.models.mixtral import MIXTRAL
from dense2moe.upcycle.models.qwen2 import QWEN2_MOE, unwindowed_fields

LLAMA = dense_decoder(
    "llama",
    "LlamaForCausalLM",
    {**attention_layer(BIASES), **FFN},
    rotary="LlamaRotaryEmbedding",
    heads=generic_heads("transformer."),
)

_NEUTRAL = ("pretraining_tp",)  # read by no model of transformers 5
CONVERSIONS = (
    Conversion(
        LLAMA,
        MIXTRAL,
        carried=(*FIELDS, "head_dim"),
        required={
            "attention_bias": Required(False, "Mixtral's attention has no biases"),
            "mlp_bias": NO_MLP_BIAS,
        },
        conditions=(WHOLE_ROTARY,),
        derived=lambda _: {"sliding_window": None},
        consumed=WIDTH,
        neutral=_NEUTRAL,
    ),
    Conversion(
        LLAMA,
        QWEN2_MOE,
        carried=FIELDS,
        required={"attention_bias": NO_OUTPUT_BIAS, "mlp_bias": NO_MLP_BIAS},
        conditions=(WHOLE_ROTARY,),
        derived=unwindowed_fields,
        consumed=(*WIDTH, "head_dim"),
        neutral=_NEUTRAL,
    ),
    *(
        Conversion(
            LLAMA,
            target,
            carried=(*FIELDS, "attention_bias"),
            required={"mlp_bias": NO_MLP_BIAS},
            conditions=(WHOLE_ROTARY,),
            derived=plain_fields,
            consumed=(*WIDTH, "head_dim"),
            neutral=_NEUTRAL,
        )
        for target in (GRANITE_MOE, GRANITE_MOE_SHARED)
    ),
    Conversion(
        LLAMA,
        GLM4_MOE,
        carried=FIELDS_WITHOUT_ROPE,
        required={"attention_bias": NO_OUTPUT_BIAS, "mlp_bias": NO_MLP_BIAS},
        conditions=(WHOLE_ROTARY,),
        derived=glm4_moe_fields,
        consumed=(*WIDTH, "head_dim", "rope_parameters"),
        by_name_alone=True,
        neutral=_NEUTRAL,
    ),
)
