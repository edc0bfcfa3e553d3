"""Routers at the start: pure tensor functions.

Routers read from hidden states are centred over their rows: a softmax, and a top-k, see only differences between
logits. They are orthogonal to the mean of the hidden states: those of real text share one large mean, a router has no
bias to take its part of the logits out again, and it would send tokens to the expert whose row lies nearest to the
mean, whatever else they hold. And they are scaled so that logits have the deviation asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def draw_router(
    num_rows: int, hidden_size: int, input_length: float, logit_std: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw router rows, float32 [num_rows, hidden_size], at random.

    Their logits have the standard deviation `logit_std`. `input_length` is the root of the mean squared length of what
    the router reads. An RMS norm gives vectors of unit mean square times its scale, so there it is the length of the
    scale. Rows of N(0, s) give logits of N(0, s * input_length), and s = logit_std / input_length. Rows of N(0, 1) at
    hidden 4096 would give logits with deviation 64, that is a router that has made up its mind.
    """
    rows = torch.empty(num_rows, hidden_size)
    if logit_std == 0:
        return rows.zero_()
    return rows.normal_(generator=generator).mul_(logit_std / max(input_length, 1e-12))


def prototype_rows(states: Sequence[torch.Tensor], logit_std: float) -> torch.Tensor:
    """Router rows from the mean hidden state of each domain.

    `states` holds one float32 [tokens, hidden] a domain, of real tokens alone; returns float32 [domains, hidden].
    """
    rows = torch.stack([domain.mean(0) for domain in states])
    return scale_rows(take_out(rows.mean(0), rows), torch.cat(list(states)), logit_std)


def take_out(direction: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """`vectors` [count, hidden] with their components along `direction` removed."""
    unit = torch.nn.functional.normalize(direction, dim=0)
    return vectors - (vectors @ unit)[:, None] * unit


def ridge_rows(states: Sequence[torch.Tensor], penalty: float, logit_std: float) -> torch.Tensor:
    """Router rows by ridge regression of domains on hidden states.

    Minimizes sum |x W^T - y|^2 + λ |W|^2 over float32 `states` [tokens, hidden] a domain, y being one at the domain and
    zero elsewhere, each domain weighing the same; λ is `penalty` times the trace of the weighted second moment over
    hidden. Solved in float64 on states without what lies along their mean, so that no row does. Returns float32
    [domains, hidden].
    """
    mean, gram = find_ridge(states, penalty)
    cross = take_out(mean, torch.stack([domain.to(torch.float64).mean(0) for domain in states])) / len(states)
    rows = torch.linalg.solve(gram, cross.T).T
    return scale_rows(rows.to(torch.float32), torch.cat(list(states)), logit_std)


def find_ridge(states: Sequence[torch.Tensor], penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The domains' mean state [H], and ridge's matrix [H, H].

    It is the weighted second moment of `states` [tokens, H] without what lies along that mean, and λ on its diagonal;
    see `ridge_rows`. In float64.
    """
    domains = [domain.to(torch.float64) for domain in states]
    mean = torch.stack([domain.mean(0) for domain in domains]).mean(0)
    gram = torch.zeros(mean.numel(), mean.numel(), dtype=torch.float64)
    for domain in domains:
        centred = take_out(mean, domain)
        gram += centred.T @ centred / (len(domain) * len(domains))
    ridge = penalty * float(gram.diagonal().mean()) + 1e-30
    return mean, gram + ridge * torch.eye(mean.numel(), dtype=torch.float64)


def kmeans_rows(
    states: torch.Tensor, num_rows: int, logit_std: float, generator: torch.Generator, num_rounds: int = 25
) -> torch.Tensor:
    """Router rows from the centres of clusters of hidden states.

    Spherical k-means (Dhillon and Modha 2001), whose rule is a router's top-1. States float32 [tokens, hidden] are
    taken without what lies along their mean, and at unit length. Starts from k-means++ (Arthur and Vassilvitskii 2007);
    a cluster that loses all its tokens restarts at the token that its centre serves worst. Returns float32 [num_rows,
    hidden].

    Raises:
        ValueError: there are fewer tokens than rows.
    """
    if len(states) < num_rows:
        raise ValueError(f"{len(states)} tokens for {num_rows} clusters")
    points = torch.nn.functional.normalize(take_out(states.mean(0), states), dim=-1)
    centres = _spread_start(points, num_rows, generator)
    nearest = torch.full((len(points),), -1)
    for _ in range(num_rounds):
        similarity, assigned = (points @ centres.T).max(-1)
        if torch.equal(assigned, nearest):
            break
        nearest = assigned
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_rows)
        for empty in (counts == 0).nonzero().flatten().tolist():
            worst = int(similarity.argmin())
            sums[empty] = points[worst]
            similarity[worst] = 1.0
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return scale_rows(centres, states, logit_std)


def split_domains(states: Sequence[torch.Tensor], num_rows: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Hidden states for each router row, by domain and cluster.

    A domain with several rows is cut into clusters. `states` holds one float32 [tokens, hidden] a domain, whose number
    divides `num_rows`. Returns as many of the same, a domain's clusters one after the other; a cluster without tokens
    has its whole domain's.

    Raises:
        ValueError: a domain has fewer tokens than rows.
    """
    count = num_rows // len(states)
    if count == 1:
        return list(states)
    found = []
    for domain in states:
        nearest = split_clusters(domain, count, generator)
        clusters = [domain[nearest == number] for number in range(count)]
        found += [cluster if len(cluster) else domain for cluster in clusters]
    return found


def split_clusters(states: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """The cluster of each of `states` [tokens, hidden], int64 [tokens].

    Raises:
        ValueError: there are fewer tokens than clusters.
    """
    if count == 1:
        return torch.zeros(len(states), dtype=torch.int64)
    return (states @ kmeans_rows(states, count, 1.0, generator).T).argmax(-1)


def _spread_start(points: torch.Tensor, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each centre is drawn by its distance from the others."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = 1 - points @ points[chosen[0]]
    for _ in range(num_rows - 1):
        weights = distance.clamp(min=0)
        fallback = torch.ones_like(weights) if float(weights.sum()) <= 0 else weights
        chosen.append(int(torch.multinomial(fallback, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - points @ points[chosen[-1]])
    return points[chosen].clone()


def scale_rows(rows: torch.Tensor, states: torch.Tensor, logit_std: float) -> torch.Tensor:
    """Centre `rows` [rows, hidden] and scale the logits' spread per token.

    Logits of `states` [tokens, hidden] then differ within a token by `logit_std` on average.
    The deviation is the root of the mean, over tokens, of the variance over rows. Rows that do not differ stay zero.
    """
    centred, spread = rows - rows.mean(0), logit_spread(rows, states)
    return centred * (logit_std / spread) if spread > 0 else centred


def logit_spread(rows: torch.Tensor, states: torch.Tensor) -> float:
    """The deviation of a token's logits over `rows` [rows, hidden].

    The root of the mean variance over the tokens of `states` [tokens, hidden].
    """
    logits = states.to(torch.float32) @ (rows - rows.mean(0)).T
    return float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())


def router_load(rows: torch.Tensor, states: torch.Tensor) -> list[float]:
    """Share of tokens whose largest logit each row has.

    Tokens are `states` [tokens, hidden], rows [rows, hidden].
    """
    winners = (states @ rows.T).argmax(-1)
    return (torch.bincount(winners, minlength=len(rows)) / max(1, len(states))).tolist()
