"""Standard errors of the difference of two models' scores.

By the bootstrap over examples (Efron 1979), in closed form where the score is a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.label_scores import list_entities

_NUM_RESAMPLES = 1000

Counts = NDArray[np.float64]


def accuracy_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
    """Of accuracies over examples, or over words.

    Words of one text are drawn together.
    """
    counts = [_count_right(answers) for answers in (found, other)]
    return _bootstrap(counts, lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1))


def _count_right(answers: Sequence[LabelAnswer]) -> Counts:
    rows = [(sum(map(float.__eq__, map(float, a.said), map(float, a.right))), len(a.right)) for a in answers]
    return np.array(rows, dtype=np.float64)


def set_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
    """Of micro F1 over labels of which several may hold."""
    counts = [_count_shared([(set(a.said), set(a.right)) for a in answers]) for answers in (found, other)]
    return _bootstrap(counts, _f1)


def entity_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer], labels: Sequence[str]) -> float:
    """Of F1 over entities."""
    counts = [
        _count_shared([(list_entities(a.said, labels), list_entities(a.right, labels)) for a in answers])
        for answers in (found, other)
    ]
    return _bootstrap(counts, _f1)


def rank_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
    """Of Spearman's correlations with the right values."""
    columns = np.array([(a.said[0], b.said[0], a.right[0]) for a, b in zip(found, other, strict=True)])
    generator, differences = np.random.default_rng(0), []
    for _ in range(_NUM_RESAMPLES):
        sample = columns[generator.integers(len(columns), size=len(columns))]
        if all(np.ptp(sample[:, place]) > 0 for place in range(3)):
            own, theirs = (spearmanr(sample[:, place], sample[:, 2]).statistic for place in range(2))
            differences.append(own - theirs)
    return float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0


def mean_error(found: Sequence[float], other: Sequence[float]) -> float:
    """Of means over examples, in closed form."""
    differences = np.subtract(found, other)
    return float(differences.std(ddof=1) / np.sqrt(len(differences))) if len(differences) > 1 else 0.0


def _count_shared(pairs: Sequence[tuple[set[object], set[object]]]) -> Counts:
    rows = [(len(said & right), len(said) + len(right)) for said, right in pairs]
    return np.array(rows, dtype=np.float64)


def _f1(sums: Counts) -> Counts:
    return 2 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def _bootstrap(counts: Sequence[Counts], score: Callable[[Counts], Counts]) -> float:
    """Of scores of both models' summed counts [examples, 2]."""
    found, other = counts
    if np.array_equal(found, other):
        return 0.0
    generator, size = np.random.default_rng(0), len(found)
    both, sums = np.concatenate([found, other], 1), []
    for _ in range(_NUM_RESAMPLES):  # one after the other: all weights at once would be gigabytes of many examples
        sums.append(np.bincount(generator.integers(size, size=size), minlength=size) @ both)
    own, theirs = np.split(np.array(sums), 2, axis=1)
    return float(np.std(score(own) - score(theirs), ddof=1))
