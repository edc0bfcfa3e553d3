"""The task of labelled rows, and its labels in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.class_heads import find_task_of, list_labels
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.images import LabelledImage
from dense2moe.upcycle.data.questions import QuestionRow
from dense2moe.upcycle.data.rows import Label
from dense2moe.upcycle.data.sentences import SentenceRow
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.head import (
    ANSWERING,
    ENDS,
    ENDS_OF_SPAN,
    OF_WORDS,
    ONE,
    OUTSIDE,
    SEVERAL,
    VALUE,
    VECTORS,
    WITHOUT_NAMES,
    HeadPart,
    LabelHead,
    LabelledTask,
    TokenPlace,
)

PLACE = "data.source"
"""Where labelled data stand in a recipe, for messages."""

_VALUE_LABELS = ("value",)  # of a head that predicts a number, unless the checkpoint's has a name of its own


@dataclass(frozen=True)
class Vocabulary:
    """Labels in the order of their numbers, and their task.

    problem: as the kind of a `LabelHead`; None where words have tags. parts, place: as of a `LabelHead`.
    """

    task: LabelledTask
    labels: tuple[str, ...]
    problem: str | None
    parts: tuple[HeadPart, ...] = ()
    place: TokenPlace = "first"

    @property
    def head(self) -> LabelHead:
        """The head that has them."""
        return LabelHead(self.labels, self.problem, self.parts, self.place)

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each label."""
        return {label: number for number, label in enumerate(self.labels)}


def find_vocabulary(rows: Mapping[Split, Sequence[Any]], config: PreTrainedConfig, where: str = PLACE) -> Vocabulary:
    """The task of labelled rows, and the order of their labels.

    `where` names their source in an error.

    Raises:
        UpcycleError: rows have labels of different kinds, or there is only one label.
    """
    every = [row for split in SPLITS for row in rows[split]]
    if isinstance(every[0], LabelledImage):
        return _name_classes("image-classification", {row.label for row in every}, config, where)
    if isinstance(every[0], SentenceRow):
        return Vocabulary(VECTORS, (), every[0].problem)
    if isinstance(every[0], QuestionRow):
        own = list_labels(config) if find_task_of(config) == ANSWERING else ()
        return Vocabulary(ANSWERING, own or ENDS, ENDS_OF_SPAN)
    if every[0].words:
        tags = {tag for row in every for tag in row.tags}
        _check_several(tags, "tag", where)
        return Vocabulary(OF_WORDS, _order(OF_WORDS, tags, config, _tag_order), None)
    first = every[0]
    for row in every:
        if type(row.label) is not type(first.label):
            raise UpcycleError(
                f"{row.where}: its label is {row.label!r}, and the first row's is {first.label!r}; all must be names, "
                "lists of names, or numbers (with `problem: value` whole ones too)"
            )
    if isinstance(first.label, float):
        own = list_labels(config) if find_task_of(config) == "text-classification" else ()
        return Vocabulary("text-classification", own if len(own) == 1 else _VALUE_LABELS, VALUE)
    if isinstance(first.label, tuple):
        names = {name for row in every for name in row.label}
        if not names:
            raise UpcycleError(f"{where}: every list of labels is empty; at least one must have a label")
        labels = _order("text-classification", names, config, _class_order)
        return Vocabulary("text-classification", labels, SEVERAL)
    return _name_classes("text-classification", {row.label for row in every}, config, where)


def _name_classes(task: LabelledTask, names: set[str], config: PreTrainedConfig, where: str) -> Vocabulary:
    _check_several(names, "label", where)
    return Vocabulary(task, _order(task, names, config, _class_order), ONE)


def _check_several(names: set[str], what: str, where: str) -> None:
    if len(names) < 2:
        raise UpcycleError(f"{where}: every {what} is '{next(iter(names))}'; must be two or more {what}s")


def _order(
    task: LabelledTask, names: Iterable[str], config: PreTrainedConfig, key: Callable[[str], Any]
) -> tuple[str, ...]:
    """Labels in order: the checkpoint's where its head has all of them."""
    wanted = set(names)
    if find_task_of(config) == task and wanted <= set(own := list_labels(config)):
        return own
    return tuple(sorted(wanted, key=key))


def _class_order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, before names."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _tag_order(tag: str) -> tuple[bool, str, str]:
    """`O` first, then types, and B- before I-."""
    prefix, _, kind = tag.partition("-")
    return (tag != OUTSIDE, kind, prefix)


def count_labels(rows: Sequence[Any], vocabulary: Vocabulary) -> dict[str, int]:
    """How often each label is right; nothing of values, vectors and answers."""
    if vocabulary.problem in WITHOUT_NAMES:
        return {}
    found = Counter(name for row in rows for name in names_of(row.answer))
    return {label: found[label] for label in vocabulary.labels}


def names_of(answer: Label) -> tuple[str, ...]:
    """The labels of an answer, as names."""
    return answer if isinstance(answer, tuple) else (str(answer),)
