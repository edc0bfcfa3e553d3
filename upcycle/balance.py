"""Load balance of experts: the loss and what is watched; pure tensor functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balance loss of one layer from its router logits [tokens, num_experts]; a scalar, 1 when balanced.

    num_experts * sum_e load_e * probability_e, where load_e is the share of the (token, slot) pairs that go to expert e and probability_e its mean
    softmax probability (Switch Transformer, Fedus et al. 2022, section 2.2, equations 4-6; load averaged over the k slots). Computed for one
    layer: pooled over layers, as `transformers` does it, every layer could collapse onto another expert and still score 1. Gradients flow through
    the probabilities alone; the load is a count.
    """
    load, probability = expert_load(router_logits, top_k), router_logits.float().softmax(-1).mean(0)
    return router_logits.shape[-1] * torch.dot(load, probability)


def expert_load(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert, from logits [tokens, num_experts]; float32 [num_experts], sums to 1."""
    num_experts = router_logits.shape[-1]
    chosen = router_logits.detach().topk(top_k, dim=-1).indices
    return F.one_hot(chosen.flatten(), num_experts).float().mean(0)


def router_entropy(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the router's softmax in nats, from logits [tokens, num_experts]; a scalar between 0 and log(num_experts)."""
    log_p = router_logits.detach().float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


@dataclass(frozen=True)
class LayerRouting:
    """How a layer routes: its number in the model, the load of each expert (shares that sum to 1), the router's mean entropy in nats."""

    number: int
    load: tuple[float, ...]
    entropy: float


def describe_routing(numbers: tuple[int, ...], router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[LayerRouting, ...]:
    """Load and entropy of every layer with experts, from its number and its logits [tokens, num_experts]."""
    return tuple(
        LayerRouting(number, tuple(expert_load(logits, top_k).tolist()), float(router_entropy(logits)))
        for number, logits in zip(numbers, router_logits, strict=True)
    )
