"""The task of vectors of texts: near for texts that belong together.

An example is several texts: a pair with the cosine that it should have, a pair that belongs together, or an anchor with
its positive and a negative; or it is one text with the vector that it should have. Each text is read by itself, and its
hidden states are pooled as the checkpoint says.

1. `cosine`: the squared error of the cosine (sentence-transformers' CosineSimilarityLoss).
2. `ranking`: the cross-entropy of an anchor's own positive among the positives and negatives of a batch (Henderson et
   al. 2017), by cosines times 20 as in sentence-transformers' MultipleNegativesRankingLoss. What is known to belong to
   an anchor is no negative of it: a text equal to its positive, and other positives of an equal anchor. The loss
   couples the examples of a batch, so a step in several parts has fewer negatives than one in one part. Held-out
   examples are ranked among all of their split.
3. `teacher`: what the cosine with the given vector lacks of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, TYPES
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.head import COSINE, RANKING, TEACHER, VECTORS, LabelHead
from dense2moe.upcycle.tasks.labels import value_figures
from dense2moe.upcycle.tasks.paired_error import mean_error, rank_error
from dense2moe.upcycle.tasks.pooling import Pooling, pool
from dense2moe.upcycle.tasks.task import Batch, Jointly, Task

SCALE = 20.0
"""What cosines are multiplied by before a softmax."""

_MOST_ROWS = 1024  # anchors that are compared with all candidates at once


@dataclass(frozen=True)
class _Problem:
    """Losses and answers of vectors, their figures, and their error.

    Losses [N] and answers are of vectors [N, K, D] and their labels.
    """

    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    answers: Callable[[torch.Tensor, torch.Tensor], list[LabelAnswer]]
    figures: Callable[[Sequence[float], Sequence[LabelAnswer]], tuple[Figure, ...]]
    error: Callable[[Sequence[LabelAnswer], Sequence[LabelAnswer]], float]


def vector_task(problem: str, pooling: Pooling) -> Task:
    """The task of vectors, by what they learn."""
    described = _PROBLEMS[problem]
    read = partial(_read, pooling)

    def loss(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return described.losses(read(hidden, batch), batch[LABELS]).mean()

    def divergence(hidden: torch.Tensor, teacher: torch.Tensor, _: float, batch: Batch) -> torch.Tensor:
        """What cosines with the teacher's vectors lack of 1."""
        return (1 - F.cosine_similarity(read(hidden, batch), read(teacher.detach(), batch), dim=-1)).mean()

    def judge(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[LabelAnswer]]:
        return described.losses(vectors, labels).tolist(), described.answers(vectors, labels)

    return Task(
        name=VECTORS,
        inputs=_inputs,
        loss=loss,
        divergence=divergence,
        figures=described.figures,
        unread={},
        decodes=False,
        predictions=_take_hidden,
        paired_error=described.error,
        head=LabelHead((), problem),
        jointly=Jointly(read, judge),
        stops_by_figure=True,
    )


def _inputs(batch: Batch) -> dict[str, Any]:
    """Every text as a row, [B * K, S]."""
    return {name: batch[name].flatten(0, -2) for name in (IDS, MASK, TYPES) if name in batch}


def _take_hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _read(pooling: Pooling, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Vectors [B, K, D] of hidden states [B * K, S, H]."""
    mask = batch[MASK]
    vectors = pool(hidden, mask.flatten(0, -2), pooling)
    return vectors.view(*mask.shape[:-1], vectors.shape[-1])


# Cosines: labels are float [N].


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)


def _cosine_losses(vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (_cosines(vectors) - wanted).square()


def _cosine_answers(vectors: torch.Tensor, wanted: torch.Tensor) -> list[LabelAnswer]:
    pairs = zip(_cosines(vectors).tolist(), wanted.tolist(), strict=True)
    return [LabelAnswer((said,), (right,)) for said, right in pairs]


# Ranking: labels are the numbers of texts, int [N, K]; equal texts have equal ones.


def _ranking_losses(vectors: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    found = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(_MOST_ROWS):
        found.append(F.cross_entropy(SCALE * _compare(vectors, texts, rows), rows, reduction="none"))
    return torch.cat(found)


def _ranking_answers(vectors: torch.Tensor, texts: torch.Tensor) -> list[LabelAnswer]:
    """The rank of each anchor's own positive; 1 is right."""
    ranks: list[int] = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(_MOST_ROWS):
        cosines = _compare(vectors, texts, rows)
        ranks += (1 + (cosines > cosines.gather(1, rows[:, None])).sum(1)).tolist()
    return [LabelAnswer((rank,), (1,)) for rank in ranks]


def _compare(vectors: torch.Tensor, texts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosines of some anchors with all candidates.

    [rows, N * (K - 1)]. Candidates are the positives, then the negatives, of all. Minus infinity where one belongs to
    the anchor, and is not its own positive.
    """
    units = F.normalize(vectors, dim=-1)
    candidates = units[:, 1:].transpose(0, 1).flatten(0, 1)
    equal = texts[rows, 1, None] == texts[:, 1:].T.flatten()
    equal[:, : len(texts)] |= texts[rows, 0, None] == texts[:, 0]
    own = rows[:, None] == torch.arange(len(candidates), device=rows.device)
    return (units[rows, 0] @ candidates.T).masked_fill(equal & ~own, -torch.inf)


def _ranking_figures(losses: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    ranks = [answer.said[0] for answer in answers]
    return (
        Figure("MRR", fmean(1 / rank for rank in ranks), "", "higher"),
        Figure("accuracy@1", fmean(rank == 1 for rank in ranks), "", "higher"),
        Figure("loss", fmean(losses), "nats", "lower"),
    )


def _reciprocal_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
    return mean_error(*([1 / answer.said[0] for answer in answers] for answers in (found, other)))


# A teacher: labels are its vectors, float [N, D].


def _likeness(vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(vectors[:, 0], wanted, dim=-1)


def _teacher_losses(vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return 1 - _likeness(vectors, wanted)


def _teacher_answers(vectors: torch.Tensor, wanted: torch.Tensor) -> list[LabelAnswer]:
    return [LabelAnswer((cosine,), (1.0,)) for cosine in _likeness(vectors, wanted).tolist()]


def _teacher_figures(_: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    return (Figure("cosine", fmean(answer.said[0] for answer in answers), "", "higher"),)


def _likeness_error(found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
    return mean_error(*([answer.said[0] for answer in answers] for answers in (found, other)))


_PROBLEMS = {
    COSINE: _Problem(_cosine_losses, _cosine_answers, value_figures, rank_error),
    RANKING: _Problem(_ranking_losses, _ranking_answers, _ranking_figures, _reciprocal_error),
    TEACHER: _Problem(_teacher_losses, _teacher_answers, _teacher_figures, _likeness_error),
}
