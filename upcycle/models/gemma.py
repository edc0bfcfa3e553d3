"""Gemma: norms of 1 + w, and a multiplied embedding.

Both are folded into the weights. The head is the embedding itself, not multiplied, so the target stores both.
"""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.architecture import Condition, Conversion, Required
from dense2moe.upcycle.models.decoder import (
    FFN,
    FIELDS,
    OUTSIDE,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
)
from dense2moe.upcycle.models.mixtral import MIXTRAL
from dense2moe.upcycle.models.parts import CLASS_OF_PART, AddOne, Matrix, MultiplyByRootOfWidth
from dense2moe.upcycle.models.qwen2 import QWEN2_MOE, unwindowed_fields

GEMMA = dense_decoder(
    "gemma",
    "GemmaForCausalLM",
    {
        part: replace(matrix, fold=AddOne()) if CLASS_OF_PART[part] == "norm" else matrix
        for part, matrix in {**attention_layer(), **FFN}.items()
    },
    {
        "embedding": replace(OUTSIDE["embedding"], fold=MultiplyByRootOfWidth()),
        "final_norm": replace(OUTSIDE["final_norm"], fold=AddOne()),
        "head": Matrix(OUTSIDE["embedding"].name),
    },
)

_REQUIRED = {"attention_bias": Required(False, "its attention has no biases")}
_CAUSAL = Condition(
    lambda c: not c.use_bidirectional_attention,
    lambda c: "use_bidirectional_attention is True; it must be False: the targets are causal decoders",
)
_TIED = Condition(
    lambda c: c.tie_word_embeddings,
    lambda c: "tie_word_embeddings is False; it must be True: Gemma's head is its embedding",
)
_UNTIED_FIELDS = tuple(name for name in FIELDS if name != "tie_word_embeddings")
CONVERSIONS = (
    Conversion(
        GEMMA,
        MIXTRAL,
        carried=(*_UNTIED_FIELDS, "head_dim"),
        required=_REQUIRED,
        conditions=(WHOLE_ROTARY, _CAUSAL, _TIED),
        derived=lambda _: {"sliding_window": None, "tie_word_embeddings": False},
        consumed=(*WIDTH, "tie_word_embeddings", "use_bidirectional_attention"),
        zero_router="rounding",
    ),
    Conversion(
        GEMMA,
        QWEN2_MOE,
        carried=_UNTIED_FIELDS,
        required=_REQUIRED,
        conditions=(WHOLE_ROTARY, _CAUSAL, _TIED),
        derived=lambda c: {**unwindowed_fields(c), "tie_word_embeddings": False},
        consumed=(*WIDTH, "head_dim", "tie_word_embeddings", "use_bidirectional_attention"),
        zero_router="rounding",
    ),
)
