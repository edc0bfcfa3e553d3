"""Heads with labels: names of labels, and the kind of problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

LabelledTask = Literal[
    "text-classification", "token-classification", "image-classification", "feature-extraction", "question-answering"
]
ONE, SEVERAL, VALUE = "single_label_classification", "multi_label_classification", "regression"
"""What transformers calls problems: one label of several, any number of them, or values."""

COSINE, RANKING, TEACHER = "cosine", "ranking", "teacher"
"""What vectors of texts learn: cosines that are given, which text belongs to which, or the dense model's vectors."""
ENDS_OF_SPAN = "ends_of_span"
"""What a head for questions learns: the places of an answer's first and last token."""
WITHOUT_NAMES = frozenset({VALUE, COSINE, RANKING, TEACHER, ENDS_OF_SPAN})
"""Kinds whose labels have no names of which a token could be."""

VECTORS: LabelledTask = "feature-extraction"
"""The task of vectors, which no head makes."""
OF_WORDS: LabelledTask = "token-classification"
"""The task whose labels are of words; several tasks at once have its class of model."""
ANSWERING: LabelledTask = "question-answering"
ENDS = ("start", "end")
"""What a head for questions says of each token."""
OUTSIDE = "O"
"""The tag of words that are of no entity."""


TokenPlace = Literal["first", "last"]
"""The token at which the label of a whole text is read."""


@dataclass(frozen=True)
class HeadPart:
    """The labels of one of several tasks that share a head.

    name: of the task. labels: as the task's data has them, in their order. kind: as of a head.
    """

    name: str
    task: LabelledTask
    labels: tuple[str, ...]
    kind: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names in the shared head."""
        return tuple(f"{self.name}/{label}" for label in self.labels)


@dataclass(frozen=True)
class LabelHead:
    """The head that a task gives a model whose checkpoint has another.

    labels: their names in the order of their numbers, none of vectors. kind: transformers' `problem_type`, or what
    vectors or ends of answers learn; None where labels are of tokens. parts: of several tasks with one head, whose
    labels stand behind one another; `place` is then the token at which labels of whole texts are read.
    """

    labels: tuple[str, ...]
    kind: str | None = None
    parts: tuple[HeadPart, ...] = ()
    place: TokenPlace = "first"

    @property
    def problem_type(self) -> str | None:
        """What a config calls the kind."""
        return self.kind if self.kind in (ONE, SEVERAL, VALUE) else None

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kind of each task's labels."""
        return tuple(part.kind for part in self.parts) or (self.kind,)


def read_parts(told: Any) -> tuple[HeadPart, ...]:
    """Parts of a head, from JSON.

    Raises:
        ValidationError: they are none.
    """
    found: tuple[HeadPart, ...] = TypeAdapter(tuple[HeadPart, ...]).validate_python(told)
    return found


def join_head(parts: tuple[HeadPart, ...], place: TokenPlace) -> LabelHead:
    """The head of tokens that several tasks share."""
    return LabelHead(tuple(name for part in parts for name in part.names), None, parts, place)
