"""What a package says of a text or an image: records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scored:
    """A label, or a word for a mask, with its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """An entity: type, text, place, and mean probability.

    `start` and `end` count characters, the end behind the last one.
    """

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class FoundAnswer:
    """A stretch of a context, with its place and probability.

    `start` and `end` count characters, the end behind the last one; the text is empty where there is no answer. The
    probability is its first token's times its last one's, in the window where it was found.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """What a package says of one text or image.

    input: the text or question, or the file's name. labels: the likeliest first; where several may hold, those that do.
    entities: of a text whose words have labels. answer: to a question. value: of a score. vector: of a model without a
    head. tasks: of several tasks at once what each says. is_cut: whether the text was longer than the model reads.
    """

    input: str
    labels: tuple[Scored, ...] = ()
    entities: tuple[Entity, ...] = ()
    answer: FoundAnswer | None = None
    value: float | None = None
    vector: tuple[float, ...] = ()
    tasks: Mapping[str, Prediction] = field(default_factory=dict)
    is_cut: bool = False

    def describe(self) -> dict[str, Any]:
        """The same as JSON has it, without what is empty."""
        told = {name: value for name, value in asdict(self).items() if name == "input" or value not in _EMPTY}
        if self.tasks:
            told["tasks"] = {name: _describe_own(own) for name, own in self.tasks.items()}
        return told


_EMPTY: tuple[Any, ...] = ((), None, False, {})


def _describe_own(prediction: Prediction) -> dict[str, Any]:
    """What one of several tasks says, whose input is told once."""
    return {name: value for name, value in prediction.describe().items() if name != "input"}
