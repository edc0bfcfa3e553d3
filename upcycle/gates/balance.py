"""Load balance of experts: losses, biases, what is watched; pure tensor functions.

A gate with a selection bias scores by sigmoids, and every other one by a softmax: so it is with all targets. Where a
function takes `bias`, float32 [num_experts], it is that of such a gate, and None of another one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from dense2moe.upcycle.gates.facts import LayerRouting


def balance_loss(
    router_logits: torch.Tensor, top_k: int, load: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Load-balance loss of one layer from its router logits [tokens, num_experts]; a scalar, 1 when balanced.

    num_experts * sum_e load_e * probability_e, where load_e is the share of the (token, slot) pairs that go to expert e
    and probability_e its mean softmax probability (Switch Transformer, Fedus et al. 2022, section 2.2, equations 4-6;
    load averaged over the k slots). Computed for one layer: pooled over layers, as `transformers` does it, every layer
    could collapse onto another expert and still score 1. Gradients flow through the probabilities alone; the load is a
    count. Where several processes or parts share a batch, `load` is the whole batch's, and the mean of their losses is
    the loss of the batch. Sigmoid scores are divided by their sum over all experts, and the load is of their top k,
    whatever a bias chooses instead (DeepSeek-V3, equations 17-20, over a batch as here and not a sequence): the loss
    balances what the router says by itself.
    """
    load = expert_load(router_logits, top_k) if load is None else load
    return router_logits.shape[-1] * torch.dot(load, mean_scores(router_logits, bias))


def mean_scores(router_logits: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of each expert's share of a token's scores, from logits [tokens, num_experts].

    Float32 [num_experts], sums to 1.
    """
    return _log_scores(router_logits, bias).softmax(-1).mean(0)


def _log_scores(router_logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Float32 [tokens, num_experts], the softmax of which is the scores over their sum.

    The logits, or logarithms of their sigmoids.
    """
    return router_logits.float() if bias is None else F.logsigmoid(router_logits.float())


def selection_scores(router_logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What the top k are chosen by, [tokens, num_experts].

    The logits, whose order a softmax keeps, or sigmoid scores plus the bias.
    """
    return router_logits.detach() if bias is None else router_logits.detach().sigmoid() + bias


def expert_counts(router_logits: torch.Tensor, top_k: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How many (token, slot) pairs go to each expert, from logits [tokens, num_experts]; int64 [num_experts]."""
    return (
        selection_scores(router_logits, bias)
        .topk(top_k, dim=-1)
        .indices.flatten()
        .bincount(minlength=router_logits.shape[-1])
    )


def move_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> None:
    """Raise the selection bias, float32 [num_experts], of each expert with less than the mean of `counts`.

    And lower that of one with more. By `rate`, in place: b += rate * sign(mean count - count) (Wang et al. 2024,
    arXiv:2408.15664, algorithm 1; DeepSeek-V3, section 2.1.2). `counts`, int64 [num_experts], are those of all tokens
    of a step; in whole numbers, so that an expert at the mean stays where it is.
    """
    bias.add_((counts.sum() - len(counts) * counts).sign().to(bias.dtype), alpha=rate)


def z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared logarithm of the sum of exponentials of router logits [tokens, num_experts]; a scalar.

    ST-MoE (Zoph et al. 2022), equation 5.
    """
    return router_logits.float().logsumexp(-1).square().mean()


def expert_load(router_logits: torch.Tensor, top_k: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert, from logits [tokens, num_experts].

    Float32 [num_experts], sums to 1.
    """
    return chosen_load(selection_scores(router_logits, bias).topk(top_k, dim=-1).indices, router_logits.shape[-1])


def chosen_load(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert, from the experts chosen, int64 [tokens, k].

    Float32 [num_experts], sums to 1.
    """
    return F.one_hot(chosen.flatten(), num_experts).float().mean(0)


def router_entropy(router_logits: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Mean entropy in nats of the router's softmax, or of sigmoid scores over their sum.

    A scalar between 0 and log(num_experts).
    From logits [tokens, num_experts]; a bias changes no score.
    """
    log_p = _log_scores(router_logits.detach(), bias).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def router_margin(router_logits: torch.Tensor, top_k: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Mean distance of the k-th largest selection score from the next, from logits [tokens, num_experts].

    A scalar, 0 where all are chosen.
    """
    if top_k == router_logits.shape[-1]:
        return torch.zeros(())
    ordered = selection_scores(router_logits, bias).float().topk(top_k + 1, dim=-1).values
    return (ordered[:, -2] - ordered[:, -1]).mean()


def expert_cosine(weights: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the weights of two experts of a layer, from [num_experts, ...].

    A float64 scalar, 1 while they are copies.
    """
    if len(weights) == 1:
        return torch.ones((), dtype=torch.float64)
    units = F.normalize(weights.detach().float().flatten(1), dim=1)
    # From what they differ by: in a sum of products the 1e-7 by which a short training moves experts apart is lost in
    # float32's rounding.
    apart = units - units[0]
    return 1 - (apart - apart.mean(0)).square().sum().double() / (len(units) - 1)


def describe_routing(
    numbers: Iterable[int],
    loads: Iterable[torch.Tensor],
    logits: Iterable[torch.Tensor],
    weights: Iterable[torch.Tensor],
    biases: Iterable[torch.Tensor | None],
    top_k: int,
) -> tuple[LayerRouting, ...]:
    """How every layer with experts routes.

    From its number, its load, its router's logits, its experts' weights, and its bias where it has one.

    loads: [num_experts] each, over whatever tokens; logits: [tokens, num_experts] each; weights: [num_experts, ...]
    each.
    """
    return tuple(
        LayerRouting(
            number,
            tuple(load.tolist()),
            float(router_entropy(z, bias)),
            float(router_margin(z, top_k, bias)),
            float(expert_cosine(stacked)),
        )
        for number, load, z, stacked, bias in zip(numbers, loads, logits, weights, biases, strict=True)
    )
