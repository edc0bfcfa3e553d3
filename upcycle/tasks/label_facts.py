"""Facts of labels: scores of each, and mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dense2moe.upcycle.tasks.answer import LabelAnswer


@dataclass(frozen=True)
class LabelScore:
    """A label or type of entity; `support` counts its true examples."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Confusion:
    """How often a model said a label where one was right."""

    right: str
    said: str
    count: int


@dataclass(frozen=True)
class LabelScores:
    """Scores of labels, and frequent pairs of right and said.

    Pairs are of examples, or of words whose labels are of words; the right ones are among them.
    """

    scores: tuple[LabelScore, ...]
    confusions: tuple[Confusion, ...]


def score_nothing(_: Sequence[LabelAnswer]) -> None:
    """No scores, of a task without labels."""
