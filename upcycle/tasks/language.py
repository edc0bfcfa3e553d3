"""Figures of a language model: perplexity, and its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.figure import Figure


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats; infinite beyond float64, NaN of NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def judge_language(losses: Sequence[float], _: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    """Figures of a language model, from the mean loss of each block."""
    return language_figures(fmean(losses))


def language_figures(loss: float) -> tuple[Figure, ...]:
    """Figures of a language model: perplexity, then mean next-token loss.

    The loss is in nats.
    """
    return (Figure("perplexity", perplexity(loss), "", "lower"), Figure("loss", loss, "nats", "lower"))
