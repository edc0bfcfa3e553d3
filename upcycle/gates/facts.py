"""Facts of routing: how a layer sends its tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRouting:
    """How a layer routes.

    Its number in the model, the load of each expert (shares that sum to 1), the router's mean entropy in nats, the mean
    distance of the last chosen logit (or sigmoid score plus bias) from the first that is not, and the mean cosine
    between two experts' weights. visits: the mean number of experts of a token; None of older runs.
    """

    number: int
    load: tuple[float, ...]
    entropy: float
    margin: float
    cosine: float
    visits: float | None = None
