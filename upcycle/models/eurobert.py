"""EuroBERT: a bidirectional encoder of Llama's shape."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.models.architecture import Conversion, Required
from dense2moe.upcycle.models.decoder import (
    BIASES,
    FFN,
    FIELDS,
    NO_MLP_BIAS,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
)
from dense2moe.upcycle.models.heads import Head
from dense2moe.upcycle.models.mixtral import MIXTRAL
from dense2moe.upcycle.models.parts import Matrix
from dense2moe.upcycle.models.qwen2 import QWEN2_MOE, unwindowed_fields

EUROBERT = dense_decoder(
    "eurobert",
    "EuroBertForMaskedLM",
    {**attention_layer(BIASES), **FFN},
    heads=(
        Head("Model", base=""),
        Head(
            "ForTokenClassification",
            {"label_head": Matrix("classifier.weight"), "label_head_bias": Matrix("classifier.bias")},
            fields={"classifier_dropout": 0.0},
        ),
        Head(
            "ForSequenceClassification",
            refusal="a head of two layers that reads all tokens, where mixtures have one that reads the last token",
        ),
    ),
)

_REQUIRED = {
    "attention_bias": Required(False, "its attention has no biases after all four projections"),
    "mlp_bias": NO_MLP_BIAS,
}
_NEUTRAL = ("pretraining_tp", "mask_token_id", "classifier_pooling")  # the last is read by one head alone


def _mixtral_fields(_: Any) -> dict[str, Any]:
    return {"sliding_window": None, "is_causal": False}


def _qwen2_moe_fields(config: Any) -> dict[str, Any]:
    return {**unwindowed_fields(config), "is_causal": False}


CONVERSIONS = (
    Conversion(
        EUROBERT,
        MIXTRAL,
        carried=(*FIELDS, "head_dim"),
        required=_REQUIRED,
        conditions=(WHOLE_ROTARY,),
        derived=_mixtral_fields,
        consumed=WIDTH,
        neutral=_NEUTRAL,
    ),
    Conversion(
        EUROBERT,
        QWEN2_MOE,
        carried=FIELDS,
        required=_REQUIRED,
        conditions=(WHOLE_ROTARY,),
        derived=_qwen2_moe_fields,
        consumed=(*WIDTH, "head_dim"),
        neutral=_NEUTRAL,
    ),
)
