"""Heads with labels: names of labels, and the kind of problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LabelledTask = Literal["text-classification", "token-classification", "image-classification"]
ONE, SEVERAL, VALUE = "single_label_classification", "multi_label_classification", "regression"
"""What transformers calls problems: one label of several, any number of them, or values."""

OUTSIDE = "O"
"""The tag of words that are of no entity."""


@dataclass(frozen=True)
class LabelHead:
    """The head that a task gives a model whose checkpoint has another.

    labels: their names in the order of their numbers. kind: transformers' `problem_type`, None where labels are of
    tokens.
    """

    labels: tuple[str, ...]
    kind: str | None = None
