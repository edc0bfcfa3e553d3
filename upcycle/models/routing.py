"""The gate of each sparse architecture, read from its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dense2moe.upcycle.checkpoints.config_files import EXPERT_COUNTS
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.top_k import TopK


def renormalized(config: Any) -> Gate:
    """A softmax whose chosen weights sum to 1."""
    return Gate(config.num_local_experts, TopK(config.num_experts_per_tok))


def as_configured(config: Any) -> Gate:
    """A softmax whose chosen weights sum to 1 where `norm_topk_prob` says so."""
    return Gate(config.num_experts, TopK(config.num_experts_per_tok), renormalize=config.norm_topk_prob)


def sigmoid(config: Any) -> Gate:
    """Sigmoids, a bias for the choice, and a factor on the weights (DeepSeek-V3)."""
    return Gate(
        config.n_routed_experts,
        TopK(config.num_experts_per_tok),
        "sigmoid",
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        selection_bias=True,
    )


def switch(config: Any) -> Gate:
    """One expert, whose weight is its probability (Switch Transformer)."""
    return Gate(config.num_experts, TopK(1), renormalize=False)


GATES: Mapping[str, Callable[[Any], Gate]] = {
    "mixtral": renormalized,
    "qwen2_moe": as_configured,
    "qwen3_moe": as_configured,
    "granitemoe": renormalized,
    "granitemoeshared": renormalized,
    "glm4_moe": sigmoid,
    "flex_olmo": as_configured,
    "switch_transformers": switch,
}
"""By model_type."""


def find_gate(config: Any) -> Gate | None:
    """The gate of a model's layers with experts; None of a model that has none.

    Of an architecture that is not in the table no more is known than how many experts a token visits: the top k of the
    router's logits.
    """
    if (read := GATES.get(config.model_type)) is not None:
        return read(config)
    return assume_gate(config)


def assume_gate(config: Any) -> Gate | None:
    """A softmax over the top k of the router's logits, whatever the architecture; None of a model without experts."""
    count = int(getattr(config, "num_experts_per_tok", None) or 0)
    sizes = (getattr(config, name, None) for name in EXPERT_COUNTS)
    return Gate(next((int(size) for size in sizes if size), count), TopK(count)) if count else None
