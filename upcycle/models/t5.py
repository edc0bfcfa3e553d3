"""T5 and Switch Transformers: encoder and decoder, one expert a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Condition, Conversion, Experts, Stack
from dense2moe.upcycle.models.parts import Matrix, Part

_OUTSIDE: Mapping[Part, Matrix] = {
    "embedding": Matrix("shared.weight"),
    "encoder_final_norm": Matrix("encoder.final_layer_norm.weight"),
    "final_norm": Matrix("decoder.final_layer_norm.weight"),
}
_ENCODER, _DECODER = (f"{stack}.block.{{layer}}.layer" for stack in ("encoder", "decoder"))


def _attention(prefix: str) -> dict[Part, Matrix]:
    names: Mapping[Part, str] = {
        "query": "SelfAttention.q",
        "key": "SelfAttention.k",
        "value": "SelfAttention.v",
        "attention_output": "SelfAttention.o",
        "positions": "SelfAttention.relative_attention_bias",
        "attention_norm": "layer_norm",
    }
    return {part: Matrix(f"{prefix}.0.{name}.weight") for part, name in names.items()}


def _cross_attention(prefix: str) -> dict[Part, Matrix]:
    names: Mapping[Part, str] = {
        "cross_query": "EncDecAttention.q",
        "cross_key": "EncDecAttention.k",
        "cross_value": "EncDecAttention.v",
        "cross_attention_output": "EncDecAttention.o",
        "cross_attention_norm": "layer_norm",
    }
    return {part: Matrix(f"{prefix}.1.{name}.weight") for part, name in names.items()}


def _ffn(prefix: str, module: str) -> dict[Part, Matrix]:
    return {
        "ffn_norm": Matrix(f"{prefix}.layer_norm.weight"),
        "ffn_up": Matrix(f"{prefix}.{module}.wi.weight"),
        "ffn_down": Matrix(f"{prefix}.{module}.wo.weight"),
    }


def _experts(prefix: str) -> dict[Part, Matrix]:
    return {
        "router": Matrix(f"{prefix}.mlp.router.classifier.weight"),
        "expert_up": Matrix(f"{prefix}.mlp.experts.expert_{{expert}}.wi.weight"),
        "expert_down": Matrix(f"{prefix}.mlp.experts.expert_{{expert}}.wo.weight"),
    }


def _gate(config: Any) -> Gate:
    return Gate(config.num_experts, TopK(1), renormalize=False)


T5 = Architecture(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    task="text2text-generation",
    outside=_OUTSIDE,
    stacks=(
        Stack("num_layers", {**_attention(_ENCODER), **_ffn(f"{_ENCODER}.1", "DenseReluDense")}),
        Stack(
            "num_decoder_layers",
            {**_attention(_DECODER), **_cross_attention(_DECODER), **_ffn(f"{_DECODER}.2", "DenseReluDense")},
        ),
    ),
    dropped=(f"{_DECODER}.1.EncDecAttention.relative_attention_bias.weight",),
)
SWITCH_TRANSFORMERS = Architecture(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    task="text2text-generation",
    outside=_OUTSIDE,
    stacks=(
        Stack("num_layers", {**_attention(_ENCODER), **_ffn(f"{_ENCODER}.1", "mlp"), **_experts(f"{_ENCODER}.1")}),
        Stack(
            "num_decoder_layers",
            {
                **_attention(_DECODER),
                **_cross_attention(_DECODER),
                **_ffn(f"{_DECODER}.2", "mlp"),
                **_experts(f"{_DECODER}.2"),
            },
        ),
    ),
    experts=Experts(
        count_field="num_experts",
        top_k_field=None,
        width_field="d_ff",
        gate=_gate,
        fixed={
            "expert_capacity": 1_000_000_000,  # no token is ever dropped
            "router_bias": False,
            "router_jitter_noise": 0.0,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": False,
            "add_cross_attention": False,
        },
        partial_layers="step",
        top_1=True,
    ),
)

CONVERSIONS = (
    Conversion(
        T5,
        SWITCH_TRANSFORMERS,
        carried=(
            "vocab_size",
            "d_model",
            "d_kv",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "dropout_rate",
            "layer_norm_epsilon",
            "initializer_factor",
            "use_cache",
            "pad_token_id",
            "eos_token_id",
        ),
        conditions=(
            Condition(
                lambda c: not c.is_gated_act,
                lambda c: (
                    f"feed_forward_proj is {c.feed_forward_proj}; SwitchTransformersForConditionalGeneration needs "
                    "one without a gate"
                ),
            ),
            Condition(
                lambda c: c.scale_decoder_outputs,
                lambda c: (
                    "tie_word_embeddings is False; SwitchTransformersForConditionalGeneration needs True: it scales "
                    "what a tied head reads"
                ),
            ),
        ),
        derived=lambda c: {"dense_act_fn": c.dense_act_fn, "tie_word_embeddings": True},
        consumed=("d_ff", "feed_forward_proj"),
        optional=("decoder_start_token_id",),
        neutral=("classifier_dropout", "is_decoder"),
        zero_router="rounding",
    ),
)
