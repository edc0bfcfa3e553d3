"""Scores of labels: precision, recall, F1, and confusions.

Classes are counted by scikit-learn, entities by seqeval, strictly: an entity is right if its first word, its last word
and its type are (the CoNLL-2003 shared task, Tjong Kim Sang and De Meulder 2003, section 3). Tags of IOB1, IOB2 and
IOBES are seqeval's own; those of BILOU are IOBES by other letters.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import precision_recall_fscore_support

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.head import OUTSIDE
from dense2moe.upcycle.tasks.label_facts import Confusion, LabelScore, LabelScores

_MOST_CONFUSIONS = 400
_TAG = re.compile(r"[BIESLU]-.+")
_LETTERS = {"L": "E", "U": "S"}  # of BILOU, and what seqeval knows


@dataclass(frozen=True)
class Averages:
    """Precision, recall and F1 of all entities together."""

    precision: float
    recall: float
    f1: float


def are_tags(labels: Sequence[str]) -> bool:
    """Whether labels are tags of entities: O, B-TYPE, I-TYPE."""
    return (
        OUTSIDE in labels
        and any(map(_TAG.fullmatch, labels))
        and all(label == OUTSIDE or _TAG.fullmatch(label) for label in labels)
    )


def score_classes(answers: Sequence[LabelAnswer], labels: Sequence[str]) -> LabelScores:
    """Scores of labels that examples or words have."""
    said, right = _flatten(answers)
    found = precision_recall_fscore_support(right, said, labels=range(len(labels)), average=None, zero_division=0.0)
    scores = tuple(
        LabelScore(name, float(found[0][place]), float(found[1][place]), float(found[2][place]), int(found[3][place]))
        for place, name in enumerate(labels)
    )
    return LabelScores(scores, _count_confusions(said, right, labels))


def score_sets(answers: Sequence[LabelAnswer], labels: Sequence[str]) -> LabelScores:
    """Scores of labels of which several may hold at once."""
    scores = []
    for number, name in enumerate(labels):
        said, right = ([number in side for side in sides] for sides in _sides(answers))
        precision, recall, f1, _ = precision_recall_fscore_support(right, said, average="binary", zero_division=0.0)
        scores.append(LabelScore(name, float(precision), float(recall), float(f1), sum(right)))
    return LabelScores(tuple(scores), ())


def score_entities(answers: Sequence[LabelAnswer], labels: Sequence[str]) -> LabelScores:
    """Scores of entities by type, and confusions of tags."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as count  # slow to import

    right, said = _tag(answers, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a type that nothing is said of
        columns = count(right, said, average=None, zero_division=0)
    types = sorted({kind for kind, _, _ in _list_entities([*right, *said])})  # in the order of the columns
    scores = tuple(
        LabelScore(name, float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(types, *columns, strict=True)
    )
    flat_said, flat_right = _flatten(answers)
    return LabelScores(scores, _count_confusions(flat_said, flat_right, labels))


def list_entities(numbers: Sequence[float], labels: Sequence[str]) -> set[object]:
    """Entities of one text: type, first word and last word of each."""
    return set(_list_entities([_name_tags(numbers, labels)]))


def _list_entities(tags: Sequence[list[str]]) -> list[tuple[str, int, int]]:
    """Entities of several texts, one after the other."""
    from seqeval.metrics.sequence_labeling import get_entities  # as above

    found: list[tuple[str, int, int]] = get_entities(list(tags))
    return found


def average_entities(answers: Sequence[LabelAnswer], labels: Sequence[str]) -> Averages:
    """Precision, recall and F1 over entities of all types (micro averages)."""
    from seqeval.metrics import f1_score, precision_score, recall_score  # as above

    right, said = _tag(answers, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [float(score(right, said, zero_division=0)) for score in (precision_score, recall_score, f1_score)]
    return Averages(*found)


def _tag(answers: Sequence[LabelAnswer], labels: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Right and said tags of each text."""
    said, right = _sides(answers)
    return [_name_tags(each, labels) for each in right], [_name_tags(each, labels) for each in said]


def _name_tags(numbers: Sequence[float], labels: Sequence[str]) -> list[str]:
    """Tags by name, in letters that seqeval knows."""
    tags = (labels[int(number)] for number in numbers)
    return [_LETTERS.get(tag[0], tag[0]) + tag[1:] for tag in tags]


def _sides(answers: Sequence[LabelAnswer]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    return [answer.said for answer in answers], [answer.right for answer in answers]


def _flatten(answers: Sequence[LabelAnswer]) -> tuple[list[int], list[int]]:
    said, right = _sides(answers)
    return [int(n) for each in said for n in each], [int(n) for each in right for n in each]


def _count_confusions(said: Sequence[int], right: Sequence[int], labels: Sequence[str]) -> tuple[Confusion, ...]:
    counted = Counter(zip(right, said, strict=True)).most_common(_MOST_CONFUSIONS)
    return tuple(Confusion(labels[true], labels[given], count) for (true, given), count in counted)
