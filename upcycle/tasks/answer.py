"""Answers: what a model says, and what is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

AnyAnswer = Any
"""What a model says of an example: a record of the task's own, which only its figures read."""


@dataclass(frozen=True)
class LabelAnswer:
    """What a model says of an example, and what is right.

    Numbers of labels: one of a text or an image, one a word of a text whose words have labels, those that hold where
    several may; or values, where a text has a score. part: the number of its task, of several at once.
    """

    said: tuple[float, ...]
    right: tuple[float, ...]
    part: int = 0


@dataclass(frozen=True)
class WindowAnswer:
    """What a model says of a question, having read one window.

    question: its number. none: the score of no answer. score: that of the best answer, which stands at characters
    `start` to `end` of the context.
    """

    question: int
    none: float
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class TextAnswer:
    """What a model says to a question, and all that is right.

    Empty where there is no answer.
    """

    said: str
    right: tuple[str, ...]
