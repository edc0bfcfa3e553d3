"""Load balance of experts: losses, biases, what is watched; pure tensor functions.

Where a function takes `bias`, it is the gate's selection bias, float32 [num_experts]; None of a gate without one, and
where the choice is asked for that the scores alone would make.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from dense2moe.upcycle.gates.choice import choice_margin
from dense2moe.upcycle.gates.facts import LayerRouting
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.scores import log_scores, score_experts, selection_scores, visit_experts


def balance_loss(router_logits: torch.Tensor, gate: Gate, load: torch.Tensor | None = None) -> torch.Tensor:
    """Load-balance loss of one layer; a scalar, 1 when balanced.

    Computed from its router logits [tokens, num_experts]. num_experts * sum_e load_e * probability_e, where load_e is
    the share of the (token, slot) pairs that go to expert e and probability_e its mean share of the scores (Switch
    Transformer, Fedus et al. 2022, section 2.2, equations 4-6; load averaged over the k slots). Computed for one layer:
    pooled over layers, as `transformers` does it, every layer could collapse onto another expert and still score 1.
    Gradients flow through the probabilities alone; the load is a count. Where several processes or parts share a batch,
    `load` is the whole batch's, and the mean of their losses is the loss of the batch. Sigmoid scores are divided by
    their sum over all experts, and the load is of their top k, whatever a bias chooses instead (DeepSeek-V3, equations
    17-20, over a batch as here and not a sequence): the loss balances what the router says by itself.
    """
    load = expert_load(router_logits, gate) if load is None else load
    return router_logits.shape[-1] * torch.dot(load, mean_scores(router_logits, gate))


def mean_scores(router_logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Mean share of each expert in a token's scores; [num_experts].

    Computed from logits [tokens, num_experts].

    Float32 [num_experts], sums to 1.
    """
    return log_scores(router_logits.float(), gate).softmax(-1).mean(0)


def expert_counts(router_logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Number of tokens that visit each expert; int64 [num_experts].

    Counted as (token, slot) pairs, from logits [tokens, num_experts].
    """
    return visit_experts(router_logits.detach(), gate, bias).flatten(0, -2).sum(0)


def move_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> None:
    """Raise the selection bias of each expert with fewer tokens than average.

    The bias is float32 [num_experts]; the mean is over `counts`. And lower that of one with more. By `rate`, in place:
    b += rate * sign(mean count - count) (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3, section 2.1.2).
    `counts`, int64 [num_experts], are those of all tokens of a step; in whole numbers, so that an expert at the mean
    stays where it is.
    """
    bias.add_((counts.sum() - len(counts) * counts).sign().to(bias.dtype), alpha=rate)


def z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared log-sum-exp of router logits [tokens, num_experts]; a scalar.

    ST-MoE (Zoph et al. 2022), equation 5.
    """
    return router_logits.float().logsumexp(-1).square().mean()


def sparsity_loss(router_logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """What falls as tokens visit fewer experts; a scalar.

    From logits [tokens, num_experts]. Of a softmax the mean entropy in nats (Huang et al. 2024, arXiv:2403.07652,
    section 3); of other scores the mean of their sum over experts (ReMoE, Wang et al. 2024, section 3, whose
    coefficient moves with the sparsity; ours stays).
    """
    logits = router_logits.float()
    if gate.score == "softmax":
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()
    return score_experts(logits, gate).sum(-1).mean()


def expert_load(router_logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Share of the (token, slot) pairs that go to each expert.

    Computed from logits [tokens, num_experts].

    Float32 [num_experts], sums to 1.
    """
    counts = expert_counts(router_logits, gate, bias)
    return counts.float() / counts.sum()


def chosen_load(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Load of each expert, from the chosen experts, int64 [tokens, k].

    The share of the (token, slot) pairs that go to it.

    Float32 [num_experts], sums to 1.
    """
    return F.one_hot(chosen.flatten(), num_experts).float().mean(0)


def router_entropy(router_logits: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Mean entropy of tokens' normalized scores, in nats.

    From logits [tokens, num_experts]; a token's scores are divided by their sum.

    A scalar between 0 and log(num_experts).
    """
    log_p = log_scores(router_logits.detach().float(), gate).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def router_margin(router_logits: torch.Tensor, gate: Gate, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Mean gap between the last chosen selection score and the next.

    Computed from logits [tokens, num_experts].

    A scalar, 0 where all are chosen.
    """
    margin = choice_margin(selection_scores(router_logits.detach(), gate, bias).float(), gate.choice)
    return margin.where(margin.isfinite(), 0.0).mean()


def expert_cosine(weights: torch.Tensor) -> torch.Tensor:
    """Mean cosine between two experts' weights [num_experts, ...].

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
    gate: Gate,
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
            float(router_entropy(z, gate)),
            float(router_margin(z, gate, bias)),
            float(expert_cosine(stacked)),
            float(expert_counts(z, gate, bias).sum()) / max(1, z.shape[0]),
        )
        for number, load, z, stacked, bias in zip(numbers, loads, logits, weights, biases, strict=True)
    )
