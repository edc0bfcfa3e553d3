"""Cohere2 and Cohere2-MoE: attention and FFN in parallel, behind one LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, SharedExpert
from dense2moe.upcycle.models.decoder import (
    BIASES,
    EXPERTS,
    FFN,
    FIELDS,
    LAYER,
    OUTSIDE,
    ROUTER,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    head_dim,
    shared_expert,
    sparse_layers,
)
from dense2moe.upcycle.models.parts import Matrix, Part

_NORM = Matrix(f"{LAYER}input_layernorm.weight")
_LAYER: Mapping[Part, Matrix] = {**attention_layer(BIASES), "attention_norm": _NORM, "ffn_norm": _NORM}


def _gate(config: Any) -> Gate:
    sigmoid = config.expert_selection_fn == "sigmoid"
    renormalize = config.norm_topk_prob or not sigmoid  # its softmax is of the chosen logits alone
    count, choice = config.num_experts, TopK(config.num_experts_per_tok)
    return Gate(count, choice, "sigmoid" if sigmoid else "softmax", renormalize=renormalize)


COHERE2 = dense_decoder("cohere2", "Cohere2ForCausalLM", {**_LAYER, **FFN})
COHERE2_MOE = Architecture(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(_LAYER, FFN, ROUTER, EXPERTS, shared_expert("shared_experts")),
    experts=Experts(
        count_field="num_experts",
        top_k_field="num_experts_per_tok",
        width_field="intermediate_size",
        gate=_gate,
        fixed={
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "shared_expert_combination_strategy": "sum",
            # read where `layer_types` is not given; but with 1, layers without experts would rotate always
            "prefix_dense_sliding_window_pattern": 4,
            "sliding_window_pattern": 4,
            "rms_norm_eps": None,  # a LayerNorm
        },
        partial_layers="types",
        dense_width_field="prefix_dense_intermediate_size",
        shared=SharedExpert("num_shared_experts", in_experts=True),
    ),
)

_FIELDS = tuple(name for name in FIELDS if name != "rms_norm_eps")
CONVERSIONS = (
    Conversion(
        COHERE2,
        COHERE2_MOE,
        carried=(*_FIELDS, "layer_norm_eps", "logit_scale", "attention_bias", "sliding_window", "layer_types"),
        conditions=(WHOLE_ROTARY,),
        derived=lambda c: {"head_dim": head_dim(c)},
        consumed=WIDTH,
    ),
)
