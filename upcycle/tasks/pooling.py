"""Hidden states of texts as one vector each.

By sentence-transformers' modes. Training, parity and predictions read this one function; padding counts in none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Vectors [B, D] of hidden states [B, T, D], 0 at padding, and of the real tokens, bool [B, T]."""


def _mean(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return hidden.sum(1) / _count(real)


def _mean_by_root(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The sum, over the square root of the number of tokens."""
    return hidden.sum(1) / _count(real).sqrt()


def _mean_by_place(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean, each token weighing as much as its place.

    Places count from 1 (SGPT, Muennighoff 2022, section 4.1).
    """
    places = (real.cumsum(1) * real).to(hidden)[..., None]
    return (hidden * places).sum(1) / places.sum(1)


def _largest(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(~real[..., None], -torch.inf).amax(1)


def _first(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden)), real.int().argmax(1)]


def _last(hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden)), (real.cumsum(1) * real).argmax(1)]


def _count(real: torch.Tensor) -> torch.Tensor:
    """Real tokens of each text, float [B, 1]."""
    return real.sum(1, keepdim=True).float()


POOLS: Mapping[str, Pool] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_place,
    "lasttoken": _last,
}
"""By sentence-transformers' name, in its order."""


@dataclass(frozen=True)
class Pooling:
    """What becomes of a text's hidden states.

    Vectors of several modes stand behind each other. normalizes: whether their length is then made 1.
    """

    modes: tuple[str, ...] = ("mean",)
    normalizes: bool = False


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Vectors of texts, float32 [B, modes * D].

    Of hidden states [B, T, D] and masks [B, T], 0 at padding; each text has one real token at least.
    """
    real = mask.bool()
    states = hidden.float().masked_fill(~real[..., None], 0.0)
    vectors = torch.cat([POOLS[mode](states, real) for mode in pooling.modes], -1)
    return F.normalize(vectors, dim=-1) if pooling.normalizes else vectors
