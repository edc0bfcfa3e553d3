"""Mistral: Llama's shape with one window for all layers."""

from __future__ import annotations

from dense2moe.upcycle.models.architecture import Conversion, Required
from dense2moe.upcycle.models.decoder import (
    FFN,
    FIELDS,
    FIELDS_WITHOUT_ROPE,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
)
from dense2moe.upcycle.models.glm4_moe import GLM4_MOE, glm4_moe_fields
from dense2moe.upcycle.models.heads import generic_heads
from dense2moe.upcycle.models.mixtral import MIXTRAL
from dense2moe.upcycle.models.qwen2 import QWEN2_MOE, windowed_fields

MISTRAL = dense_decoder("mistral", "MistralForCausalLM", {**attention_layer(), **FFN}, heads=generic_heads())

CONVERSIONS = (
    Conversion(
        MISTRAL,
        MIXTRAL,
        carried=(*FIELDS, "head_dim", "sliding_window"),
        conditions=(WHOLE_ROTARY,),
        consumed=WIDTH,
    ),
    Conversion(
        MISTRAL,
        QWEN2_MOE,
        carried=FIELDS,
        conditions=(WHOLE_ROTARY,),
        derived=windowed_fields,
        consumed=(*WIDTH, "head_dim", "sliding_window"),
    ),
    Conversion(
        MISTRAL,
        GLM4_MOE,
        carried=FIELDS_WITHOUT_ROPE,
        required={"sliding_window": Required(None, "its attention has no window")},
        conditions=(WHOLE_ROTARY,),
        derived=glm4_moe_fields,
        consumed=(*WIDTH, "head_dim", "rope_parameters"),
        by_name_alone=True,
    ),
)
