"""Scores of tasks and their standard errors.

The scores are accuracy, F1, exact match and Spearman's correlation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

_NUM_RESAMPLES = 1000


def answer_f1(written: str, right: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall, for the best answer.

    SQuAD, Rajpurkar et al. 2016, section 6.1.
    """
    return max(_word_f1(_words(written), _words(each)) for each in right)


def is_exact(written: str, right: Sequence[str]) -> bool:
    """Whether it equals a correct answer word by word.

    This is SQuAD's exact match.
    """
    return any(_words(written) == _words(each) for each in right)


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD's evaluation has them."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _word_f1(written: list[str], right: list[str]) -> float:
    if not written or not right:
        return float(written == right)
    shared = (Counter(written) & Counter(right)).total()
    return 2 * shared / (len(written) + len(right))


def macro_f1(chosen: Sequence[int], right: Sequence[int]) -> float:
    """F1 of each class, averaged over classes."""
    return float(f1_score(right, chosen, average="macro", zero_division=0.0))


def rank_correlation(found: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's correlation; 0 where all found values are equal."""
    return float(spearmanr(found, right).statistic) if np.ptp(found) > 0 else 0.0


def mean_difference_error(found: Sequence[float], other: Sequence[float]) -> float:
    """Standard error of the mean of paired differences."""
    differences = np.subtract(found, other)
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def rank_correlation_error(found: Sequence[float], other: Sequence[float], right: Sequence[float]) -> float:
    """Standard error of the difference of two rank correlations.

    Both correlations are with the same true scores.

    By the bootstrap over examples (Efron 1979).
    """
    generator, columns = np.random.default_rng(0), np.array([found, other, right])
    differences = []
    for _ in range(_NUM_RESAMPLES):
        sample: NDArray[np.float64] = columns[:, generator.integers(columns.shape[1], size=columns.shape[1])]
        if np.ptp(sample[2]) > 0:
            differences.append(
                rank_correlation(list(sample[0]), list(sample[2])) - rank_correlation(list(sample[1]), list(sample[2]))
            )
    return float(np.std(differences, ddof=1))
