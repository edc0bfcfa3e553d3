"""Granite and its mixtures: multipliers, and experts in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, Multipliers, SharedExpert
from dense2moe.upcycle.models.decoder import (
    BIASES,
    FFN,
    FIELDS,
    LAYER,
    NO_MLP_BIAS,
    OUTSIDE,
    SPARSE,
    WHOLE_ROTARY,
    WIDTH,
    attention_layer,
    dense_decoder,
    head_dim,
    sparse_layers,
)
from dense2moe.upcycle.models.mixtral import renormalized_gate
from dense2moe.upcycle.models.parts import Matrix, Part

_GATE_UP = f"{SPARSE}input_linear.weight"  # the rows of gate before those of up
_SHARED_GATE_UP = f"{LAYER}shared_mlp.input_linear.weight"
_EXPERTS: Mapping[Part, Matrix] = {
    "router": Matrix(f"{SPARSE}router.layer.weight"),
    "expert_gate": Matrix(_GATE_UP, lambda c: (0, c.intermediate_size)),
    "expert_up": Matrix(_GATE_UP, lambda c: (c.intermediate_size, 2 * c.intermediate_size)),
    "expert_down": Matrix(f"{SPARSE}output_linear.weight"),
}
_SHARED: Mapping[Part, Matrix] = {
    "shared_gate": Matrix(_SHARED_GATE_UP, lambda c: (0, c.shared_intermediate_size)),
    "shared_up": Matrix(_SHARED_GATE_UP, lambda c: (c.shared_intermediate_size, 2 * c.shared_intermediate_size)),
    "shared_down": Matrix(f"{LAYER}shared_mlp.output_linear.weight"),
}


def _multipliers(config: Any) -> Multipliers:
    return Multipliers(
        config.embedding_multiplier, config.attention_multiplier, config.residual_multiplier, config.logits_scaling
    )


_FIELDS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
GRANITE = dense_decoder("granite", "GraniteForCausalLM", {**attention_layer(BIASES), **FFN})
_EXPERT_FIELDS = Experts(
    count_field="num_local_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    gate=renormalized_gate,
    fixed={},
)
GRANITE_MOE = Architecture(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(attention_layer(BIASES), _EXPERTS),
    experts=_EXPERT_FIELDS,
    rotary="GraniteMoeRotaryEmbedding",
    multipliers=_multipliers,
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    stacks=sparse_layers(attention_layer(BIASES), _EXPERTS, _SHARED),
    experts=replace(_EXPERT_FIELDS, shared=SharedExpert("shared_intermediate_size")),
    rotary="GraniteMoeSharedRotaryEmbedding",
)

# Granite SWA: windows in some layers, each layer its own rotary base or none, a sink for each head.
_SWA_LAYER: Mapping[Part, Matrix] = {**attention_layer(BIASES), "sinks": Matrix(f"{LAYER}self_attn.sinks")}
_SWA_GATE_UP = f"{SPARSE}experts.gate_up_proj"
_SWA_EXPERTS: Mapping[Part, Matrix] = {
    "router": Matrix(f"{SPARSE}router.weight"),
    "expert_gate": Matrix(_SWA_GATE_UP, lambda c: (0, c.intermediate_size)),
    "expert_up": Matrix(_SWA_GATE_UP, lambda c: (c.intermediate_size, 2 * c.intermediate_size)),
    "expert_down": Matrix(f"{SPARSE}experts.down_proj"),
}
GRANITE_SWA = dense_decoder("granite_swa", "GraniteSWAForCausalLM", {**_SWA_LAYER, **FFN})
GRANITE_MOE_SWA = replace(
    GRANITE_MOE_SHARED,
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    stacks=sparse_layers(_SWA_LAYER, _SWA_EXPERTS, _SHARED),
    rotary=None,
)


def plain_fields(config: Any) -> dict[str, Any]:
    """Granite's fields for a source without multipliers.

    They multiply by one, and attention's scale is Llama's.
    """
    return {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": head_dim(config) ** -0.5,
        "head_dim": head_dim(config),
    }


CONVERSIONS = tuple(
    Conversion(
        family,
        target,
        carried=(*FIELDS, "attention_bias", *_FIELDS, *more),
        required={"mlp_bias": NO_MLP_BIAS},
        conditions=(WHOLE_ROTARY,),
        consumed=WIDTH,
        optional=("head_dim",),
    )
    for family, target, more in (
        (GRANITE, GRANITE_MOE, ()),
        (GRANITE, GRANITE_MOE_SHARED, ()),
        (GRANITE_SWA, GRANITE_MOE_SWA, ("sliding_window", "layer_types", "layer_rope_theta")),
    )
)
