"""Facts of the receipt and of sources: how models compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

DistanceClass = Literal["ffn", "attention", "norms", "embedding", "head", "biases"]
"""Kinds of tensors that are told apart."""


@dataclass(frozen=True)
class ReceiptLine:
    """One comparison of the two models.

    It says which router, dtype, text and experts implementation were compared, and the result. `text` names the part of
    the models where they are compared part by part; the embedding and the head have "no" router and "no" experts.
    `limit` is the largest rel that is allowed; none where the function need not be kept, or the dtype rounds too
    coarsely to judge. `bitwise_due`: every bit must be equal, or equal to the dense model's with FFN outputs halved in
    the dtype and added again, which is `halves_bitwise` (false where it was not needed). `noise`: rel of the dense
    model to itself in float64, where it was measured. `group_coverage`: of granular experts, the share of tokens that
    were sent to whole copies of the FFN.
    """

    router: str
    dtype: str
    text: str
    experts: str
    num_tokens: int
    rel: float
    bitwise: bool
    bitwise_due: bool
    limit: float | None
    group_coverage: float | None = None
    halves_bitwise: bool = False
    noise: float | None = None


@dataclass(frozen=True)
class Receipt:
    """All comparisons of the receipt, and remarks on what was left out.

    Comparisons are of whole models or layer by layer.
    """

    mode: Literal["whole", "layers"]
    comparisons: tuple[ReceiptLine, ...]
    notes: tuple[str, ...]


def shows_equality(lines: Iterable[ReceiptLine]) -> bool:
    """Whether a receipt shows both models equal, but for float32 rounding."""
    written = [line for line in lines if line.dtype == "float32" and line.router == "shipped"]
    return bool(written) and all(line.limit is not None and line.rel <= line.limit for line in written)


@dataclass(frozen=True)
class SoupLook:
    """One look of a greedy soup: some models averaged, and their loss.

    `models` names sources in the order in which they were added, "" being the base; the last is the one looked at.
    `loss` is of the whole averaged model on held-out text, in nats a token. `kept`: the last one stayed.
    """

    models: tuple[str, ...]
    loss: float
    kept: bool


@dataclass(frozen=True)
class SourceDistance:
    """One source's distance from the base.

    `by_class`: |source - base| / |base| over all tensors of a class, Frobenius norms. `equal` where every value is the
    base's own.
    """

    name: str
    by_class: dict[DistanceClass, float]
    equal: bool
