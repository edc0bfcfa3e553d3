"""Nexus: router rows as a projection of domain embeddings.

Gritsch et al. 2024. The paper's: each domain has one embedding, the mean of its texts' embeddings; each layer has a
projection of embeddings to router rows, shared by all experts; and an expert that is added later gets its row from its
domain's embedding alone, without text of the other domains.

Ours: a text's embedding is the mean of the model's own token embeddings, where the paper asks another model; the
projection is linear and fitted before training, where the paper trains two layers along with the mixture; and it is
multiplied out at once, so that the checkpoint has an ordinary router, which trains freely from there. What the
projection has to give for a text is the row that ridge regression would give it as a domain of its own. So it learns
from hundreds of texts, and not from a handful of domains.

Pure tensor functions, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dense2moe.upcycle.gates.start import find_ridge, scale_rows, take_out

_MOST_DIRECTIONS = 64
_EMBEDDING_PENALTY = 0.1
"""Of the projection, relative to the mean square distance of one text from the centre.

It sent more tokens of a domain that was held out to its row than 0.01 (docs/results/upcycling.md)."""


@dataclass(frozen=True)
class Embeddings:
    """Domains' embeddings, and directions in which texts differ.

    domains: float64 [domains, H], in the order of router rows.
    directions: float64 [R, H], orthonormal: the principal directions of the texts, around the mean of `domains`.
    shares: float64 [R, texts]: what a ridge regression on places along `directions` takes of each text's target.
    """

    domains: torch.Tensor
    directions: torch.Tensor
    shares: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """The domains' places along the directions, [domains, R]."""
        return place(self.domains, self.domains.mean(0), self.directions)


def place(embeddings: torch.Tensor, centre: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Places [..., R] of embeddings [..., H] along directions [R, H]."""
    return (embeddings.double() - centre.double()) @ directions.double().T


def describe_texts(texts: Sequence[torch.Tensor]) -> Embeddings:
    """What a projection needs to know of texts; see `Embeddings`.

    `texts` holds the embeddings of one domain's texts each, [texts, H]. Domains weigh the same.
    """
    domains = torch.stack([own.double().mean(0) for own in texts])
    weights = torch.cat([torch.full((len(own),), 1 / len(own), dtype=torch.float64) for own in texts]).sqrt()
    centred = (torch.cat([own.double() for own in texts]) - domains.mean(0)) * weights[:, None]
    left, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = (sizes > 1e-9 * sizes[:1].clamp(min=1e-30))[:_MOST_DIRECTIONS].nonzero().flatten()
    penalty = _EMBEDDING_PENALTY * float(sizes.square().sum()) / len(centred)
    left, sizes, directions = left[:, kept], sizes[kept], directions[kept]
    shares = (sizes / (sizes.square() + penalty))[:, None] * left.T * weights
    return Embeddings(domains, directions, shares)


def fit_projection(
    states: Sequence[torch.Tensor],
    text_means: torch.Tensor,
    embeddings: Embeddings,
    penalty: float,
    logit_std: float,
) -> torch.Tensor:
    """A layer's projection, float32 [R, H]: places along directions to rows.

    `states` holds one float32 [tokens, H] a router row, of real tokens alone, and `text_means` [texts, H] the mean
    state of each text. `penalty` is of the ridge regression that targets are taken from, as in `ridge_rows`. The
    domains' own rows are centred, and their logits' deviation within a token is `logit_std`.
    """
    mean, gram = find_ridge(states, penalty)
    targets = torch.linalg.solve(gram, take_out(mean, text_means.double()).T).T
    projection: torch.Tensor = embeddings.shares @ targets
    rows = (embeddings.places @ projection).float()
    scaled = scale_rows(rows, torch.cat(list(states)), logit_std)
    factor = float(scaled.norm()) / max(float(rows.norm()), 1e-30)
    return projection.mul(factor).to(torch.float32)
