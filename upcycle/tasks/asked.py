"""Questions that a model is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dense2moe.upcycle.tasks.spans import LONGEST_ANSWER


@dataclass(frozen=True)
class Question:
    """A question's context, and the right answers, none if it has none."""

    context: str
    right: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """Held-out questions by their numbers.

    may_lack: whether the data has questions without an answer, so that nothing may be said. longest: most tokens of an
    answer.
    """

    questions: Mapping[int, Question]
    may_lack: bool = True
    longest: int = LONGEST_ANSWER
