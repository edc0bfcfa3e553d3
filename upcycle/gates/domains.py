"""Domains with experts of their own: pure tensor functions.

The experts of a layer are divided evenly over the domains of the text, in order: of 8 experts and 4 domains, the first
two are the first domain's.
"""

from __future__ import annotations

import torch

from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.scores import log_scores


def domain_experts(
    domains: torch.Tensor, block_size: int, num_domains: int, num_experts: int, top_k: int
) -> torch.Tensor:
    """Each token's experts where domains own experts; int64 [B * block_size, k].

    `domains` has the domain of each block [B]. A domain with more than `top_k` experts has its tokens take turns among
    them.
    """
    share = num_experts // num_domains
    count = min(top_k, share)
    position = torch.arange(block_size, device=domains.device)[:, None] * count + torch.arange(
        count, device=domains.device
    )
    return (domains[:, None, None] * share + position % share).flatten(0, 1)


def domain_loss(router_logits: torch.Tensor, gate: Gate, domains: torch.Tensor, num_domains: int) -> torch.Tensor:
    """Cross-entropy of a layer's router with the blocks' domains; a scalar.

    In nats a token. `router_logits` [tokens, num_experts] are of whole blocks, one after the other, and `domains` [B]
    has the domain of each; or [tokens], the domain of each token. The probability of a domain is the sum of its
    experts' shares of the scores. A router that knows the domains from the start keeps experts apart that learn from
    different text; without it, copies get no gradient that tells their tokens apart.
    """
    log_shares = log_scores(router_logits.float(), gate).log_softmax(-1)
    log_domains = log_shares.unflatten(-1, (num_domains, -1)).logsumexp(-1)
    wanted = domains.repeat_interleave(len(router_logits) // len(domains))
    return torch.nn.functional.nll_loss(log_domains, wanted)


def faded(coefficient: float, fade: float, done: float) -> float:
    """A loss's weight, which falls linearly to 0 during training.

    It is 0 at the share `fade` of all steps; `done` is the share of steps that are done.
    """
    return coefficient * max(0.0, 1 - done / fade)


def expert_information(loads: torch.Tensor) -> torch.Tensor:
    """Mutual information of expert and domain, in nats.

    Computed from the load of each domain's text [..., domains, experts]. Domains weigh the same. 0 where all domains
    are routed alike, at most the logarithm of the smaller number.
    """
    joint = loads.double() / loads.shape[-2]
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    terms = torch.where(joint > 0, joint * (joint / independent).log(), 0.0)
    return terms.sum((-2, -1))
