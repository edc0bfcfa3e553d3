"""Limits of whole models, from two equally rounded computations.

Where a graph rounds what it computes with, to 8 or to 16 bits, two right computations part at every number that lies
between two steps: a sum in another order takes the other one, and from there on both go their own ways, layer by layer.
So no bound on the logits of a deep model can be as tight as that of one product (`dense2moe.export.parity.inside.local`
has these). What can be asked of whole models is that they part no further than the twin does from itself, rounded in
the same way, when what its products read is moved by a small part of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dense2moe.export.parity.agreement import Follow, factor_of, mean_divergence
from dense2moe.export.parity.forward import Forward, Reference
from dense2moe.export.parity.records import Limit, Noise
from dense2moe.export.parity.taps import Seen
from dense2moe.export.parity.ties import TIE_MARGIN, find_tie_margin, same_experts

_TOKENS = 256
_KL_MULTIPLE = 3.0
_LOGITS_MULTIPLE = 4.0
_FACTOR_MULTIPLE = 8.0
_LEAST_FACTOR = 2e-5


@dataclass(frozen=True)
class Rounding:
    """Two computations of the twin with equal rounding.

    KL in nats, agreement of experts in the worst layer, the largest relative error of a token.

    `factor`: what the logits of one are times those of the other, less one.
    """

    kl: float
    routing: float
    logits: float
    factor: float
    tie_margin: float
    num_tokens: int

    @property
    def noise(self) -> Noise:
        """As a record of noise."""
        return Noise(self.logits, self.num_tokens, self.tie_margin)


class RoundingMeasure:
    """Sums over batches of text.

    Of what a rounded twin differs by from itself when what its products read is moved.
    """

    def __init__(self, reference: Reference, moved: Callable[[], AbstractContextManager[None]], follow: Follow) -> None:
        """`moved` is entered for the second computation.

        `follow` runs the twin with what the package's routers said.
        """
        self._reference, self._moved, self._follow = reference, moved, follow
        self._kl, self._same, self._num_tokens = 0.0, list[float](), 0
        self._error, self._parts, self._margin = 0.0, (0.0, 0.0), TIE_MARGIN

    def add(self, ids: torch.Tensor, expected: Forward, seen: Seen) -> None:
        """Add text, ids [B, S], with the twin's and the package's results.

        No more than enough of it is taken.
        """
        count = min(len(ids), -(-(_TOKENS - self._num_tokens) // ids.shape[1]))
        if count <= 0:
            return
        with self._moved():
            found = self._follow(self._reference, seen.of_rows(count))
        own = expected.logits[:count]
        self._kl += mean_divergence(own, found.logits) * found.logits[..., 0].numel()
        self._num_tokens += found.logits[..., 0].numel()
        self._error = max(self._error, float((found.logits - own).abs().max() / own.abs().max()))
        self._parts = tuple(map(sum, zip(self._parts, factor_of(found.logits, own), strict=True)))  # type: ignore[assignment]
        pairs = [
            (a, b[:count])
            for a, b in zip(found.routers, expected.routers, strict=True)
            if a is not None and b is not None
        ]
        self._margin = max(self._margin, find_tie_margin([a for a, _ in pairs], [b for _, b in pairs]))
        assert expected.choice is not None or not pairs, "routers in a model that chooses no experts"
        counts = [float(same_experts(a, b, expected.choice).sum()) for a, b in pairs if expected.choice is not None]
        self._same = [old + new for old, new in zip(self._same or [0.0] * len(counts), counts, strict=True)]

    def result(self) -> Rounding:
        """The measured noise and divergences."""
        count, (product, square) = self._num_tokens, self._parts
        return Rounding(
            max(self._kl / count, 0.0),
            min(self._same, default=float(count)) / count,
            self._error,
            abs(product / max(square, 1e-300) - 1),
            self._margin,
            count,
        )


def rounding_limits(limits: dict[str, Limit], found: Rounding) -> dict[str, Limit]:
    """The limits of whole models from two equally rounded computations.

    Those of KL and routing are never tighter than the settings say.
    """
    wider = dict(limits)
    cost = f"the difference between two equally rounded computations of the twin on {found.num_tokens:,} tokens"
    if "kl" in limits and (kl := _KL_MULTIPLE * found.kl) > limits["kl"].value:
        wider["kl"] = Limit(kl, f"{_KL_MULTIPLE:g} times {cost}, {found.kl:.1e} nats")
    if "routing" in limits and (routing := 1 - _KL_MULTIPLE * (1 - found.routing)) < limits["routing"].value:
        wider["routing"] = Limit(
            routing, f"{_KL_MULTIPLE:g} times {cost}: {found.routing:.2%} keep their experts in the worst layer"
        )
    wider["logits"] = Limit(
        _LOGITS_MULTIPLE * found.logits, f"{_LOGITS_MULTIPLE:g} times {cost}, {found.logits:.1e} of the largest logit"
    )
    least = max(found.factor, _LEAST_FACTOR)
    wider["factor"] = Limit(
        _FACTOR_MULTIPLE * least,
        f"{_FACTOR_MULTIPLE:g} times {cost}: logits that are {found.factor:.1e} larger or smaller",
    )
    return wider
