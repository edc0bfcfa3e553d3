"""Phi-3: fused matrices, one window, and long rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.models.architecture import Conversion, Required
from dense2moe.upcycle.models.decoder import (
    FFN,
    FIELDS_WITHOUT_ROPE,
    LAYER,
    MLP,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    head_dim,
)
from dense2moe.upcycle.models.mixtral import MIXTRAL
from dense2moe.upcycle.models.parts import Matrix, Part
from dense2moe.upcycle.models.qwen2 import QWEN2_MOE, windowed_fields


def _query_rows(config: Any) -> tuple[int, int]:
    return 0, config.num_attention_heads * head_dim(config)


def _key_rows(config: Any) -> tuple[int, int]:
    start = _query_rows(config)[1]
    return start, start + config.num_key_value_heads * head_dim(config)


def _value_rows(config: Any) -> tuple[int, int]:
    start = _key_rows(config)[1]
    return start, start + config.num_key_value_heads * head_dim(config)


_QUERY_KEY_VALUE = f"{LAYER}self_attn.qkv_proj.weight"
_GATE_UP = f"{MLP}gate_up_proj.weight"
_FUSED: Mapping[Part, Matrix] = {
    "query": Matrix(_QUERY_KEY_VALUE, _query_rows),
    "key": Matrix(_QUERY_KEY_VALUE, _key_rows),
    "value": Matrix(_QUERY_KEY_VALUE, _value_rows),
    "ffn_gate": Matrix(_GATE_UP, lambda c: (0, c.intermediate_size)),
    "ffn_up": Matrix(_GATE_UP, lambda c: (c.intermediate_size, 2 * c.intermediate_size)),
}
PHI3 = dense_decoder("phi3", "Phi3ForCausalLM", {**attention_layer(), **FFN, **_FUSED})


def _longrope_fields(config: Any) -> dict[str, Any]:
    """Rotary parameters with the length that longrope stretches among them.

    Phi-3 keeps it beside them. The targets also check the number of factors, for which they want the size of a head.
    """
    rope = dict(config.rope_parameters)
    if rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings
    return {"rope_parameters": rope, "head_dim": head_dim(config)}


_NO_DROPOUT = {
    "resid_pdrop": Required(0.0, "it has no dropout after attention and FFN"),
    "embd_pdrop": Required(0.0, "it has no dropout after the embedding"),
}
_ROPE = ("rope_parameters", "original_max_position_embeddings")
CONVERSIONS = (
    Conversion(
        PHI3,
        MIXTRAL,
        carried=(*FIELDS_WITHOUT_ROPE, "sliding_window"),
        required=_NO_DROPOUT,
        conditions=(WHOLE_ROTARY,),
        derived=_longrope_fields,
        consumed=(*WIDTH, *_ROPE),
    ),
    Conversion(
        PHI3,
        QWEN2_MOE,
        carried=FIELDS_WITHOUT_ROPE,
        required=_NO_DROPOUT,
        conditions=(WHOLE_ROTARY,),
        derived=lambda c: {**windowed_fields(c), **_longrope_fields(c)},
        consumed=(*WIDTH, *_ROPE, "sliding_window"),
    ),
)
