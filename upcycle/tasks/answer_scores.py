"""Scores of answers as SQuAD's evaluation has them.

Answers are compared without case, punctuation, articles and spare spaces; the best of several right ones counts
(Rajpurkar et al. 2016, section 6.1). F1 is of words, each answer a bag of them; where one is empty both must be
(Rajpurkar et al. 2018, section 5).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from dense2moe.upcycle.tasks.answer import TextAnswer

AnswerScore = Callable[[str, str], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """A text without case, punctuation, articles and spare spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def match_exactly(said: str, right: str) -> float:
    """1 where two normalized answers are the same, else 0."""
    return float(normalize(said) == normalize(right))


def match_words(said: str, right: str) -> float:
    """F1 of the words of an answer."""
    own, theirs = (Counter(normalize(text).split()) for text in (said, right))
    if not own or not theirs:
        return float(own == theirs)
    return 2 * (own & theirs).total() / (own.total() + theirs.total())


def score_answer(answer: TextAnswer, score: AnswerScore) -> float:
    """The best score beside all right answers.

    Those of which nothing is left to compare are none.
    """
    right = [text for text in answer.right if normalize(text)] or [""]
    return max(score(answer.said, text) for text in right)


def average_answers(answers: Sequence[TextAnswer], score: AnswerScore) -> float:
    """The mean score over questions."""
    return fmean(score_answer(answer, score) for answer in answers)


def answers_error(found: Sequence[TextAnswer], other: Sequence[TextAnswer]) -> float:
    """Standard error of the difference of two models' F1.

    Over questions, the same for both.
    """
    pairs = zip(found, other, strict=True)
    differences = [score_answer(own, match_words) - score_answer(theirs, match_words) for own, theirs in pairs]
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
