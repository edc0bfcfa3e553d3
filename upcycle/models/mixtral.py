"""Mixtral: experts in every layer, none shared; most decoders' nearest target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Experts
from dense2moe.upcycle.models.decoder import OUTSIDE, SPARSE, attention_layer, one_window, sparse_layers
from dense2moe.upcycle.models.heads import generic_heads
from dense2moe.upcycle.models.parts import Matrix, Part


def renormalized_gate(config: Any) -> Gate:
    """A softmax whose chosen weights sum to 1."""
    return Gate(config.num_local_experts, TopK(config.num_experts_per_tok))


_EXPERTS: Mapping[Part, str] = {"expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}

MIXTRAL = Architecture(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    task="text-generation",
    outside=OUTSIDE,
    stacks=sparse_layers(
        attention_layer(),
        {"router": Matrix(f"{SPARSE}gate.weight")},
        {part: Matrix(f"{SPARSE}experts.{{expert}}.{name}.weight") for part, name in _EXPERTS.items()},
    ),
    experts=Experts(
        count_field="num_local_experts",
        top_k_field="num_experts_per_tok",
        width_field="intermediate_size",
        gate=renormalized_gate,
        fixed={"router_jitter_noise": 0.0},
    ),
    heads=generic_heads(),
    rotary="MixtralRotaryEmbedding",
    window=one_window,
)
