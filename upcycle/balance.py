"""Load balance of experts: the loss and what is watched; pure tensor functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def balance_loss(router_logits: torch.Tensor, top_k: int, load: torch.Tensor | None = None) -> torch.Tensor:
    """Load-balance loss of one layer from its router logits [tokens, num_experts]; a scalar, 1 when balanced.

    num_experts * sum_e load_e * probability_e, where load_e is the share of the (token, slot) pairs that go to expert e and probability_e its mean
    softmax probability (Switch Transformer, Fedus et al. 2022, section 2.2, equations 4-6; load averaged over the k slots). Computed for one
    layer: pooled over layers, as `transformers` does it, every layer could collapse onto another expert and still score 1. Gradients flow through
    the probabilities alone; the load is a count. Where several processes share a batch, `load` is the whole batch's, and the mean of their losses is
    the loss of the batch.
    """
    load = expert_load(router_logits, top_k) if load is None else load
    return router_logits.shape[-1] * torch.dot(load, router_logits.float().softmax(-1).mean(0))


def z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared logarithm of the sum of exponentials of router logits [tokens, num_experts] (ST-MoE, Zoph et al. 2022, equation 5); a scalar."""
    return router_logits.float().logsumexp(-1).square().mean()


def expert_load(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert, from logits [tokens, num_experts]; float32 [num_experts], sums to 1."""
    return chosen_load(router_logits.detach().topk(top_k, dim=-1).indices, router_logits.shape[-1])


def chosen_load(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert, from the experts chosen, int64 [tokens, k]; float32 [num_experts], sums to 1."""
    return F.one_hot(chosen.flatten(), num_experts).float().mean(0)


def router_entropy(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the router's softmax in nats, from logits [tokens, num_experts]; a scalar between 0 and log(num_experts)."""
    log_p = router_logits.detach().float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def router_margin(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mean distance of the k-th largest logit from the next, from logits [tokens, num_experts]; a scalar, 0 where every expert is chosen."""
    if top_k == router_logits.shape[-1]:
        return torch.zeros(())
    ordered = router_logits.detach().float().topk(top_k + 1, dim=-1).values
    return (ordered[:, -2] - ordered[:, -1]).mean()


def expert_cosine(weights: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the weights of two experts of a layer, from [num_experts, ...]; a scalar, 1 while they are copies."""
    flat = weights.detach().float().flatten(1)
    num_experts = len(flat)
    if num_experts == 1:
        return torch.ones(())
    products = flat @ flat.T
    lengths = products.diagonal().sqrt()
    return ((products / lengths / lengths[:, None]).sum() - num_experts) / (num_experts * (num_experts - 1))


@dataclass(frozen=True)
class LayerRouting:
    """How a layer routes.

    Its number in the model, the load of each expert (shares that sum to 1), the router's mean entropy in nats, the mean distance of the last chosen
    logit from the first that is not, and the mean cosine between two experts' weights.
    """

    number: int
    load: tuple[float, ...]
    entropy: float
    margin: float
    cosine: float


def describe_routing(
    numbers: Iterable[int], loads: Iterable[torch.Tensor], logits: Iterable[torch.Tensor], weights: Iterable[torch.Tensor], top_k: int
) -> tuple[LayerRouting, ...]:
    """How every layer with experts routes: from its number, its load, its router's logits and its experts' weights.

    loads: [num_experts] each, over whatever tokens; logits: [tokens, num_experts] each; weights: [num_experts, ...] each.
    """
    return tuple(
        LayerRouting(number, tuple(load.tolist()), float(router_entropy(z)), float(router_margin(z, top_k)), float(expert_cosine(stacked)))
        for number, load, z, stacked in zip(numbers, loads, logits, weights, strict=True)
    )
