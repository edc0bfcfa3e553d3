"""Tasks with labels: of texts, of words in them, and of images.

The loss of a batch is the mean over its examples, and an example's is the mean over what is labelled in it. So padding
counts nowhere, and a batch has the losses of its examples one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, PIXELS, TYPES, UNLABELLED
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.head import SEVERAL, VALUE, LabelHead, LabelledTask
from dense2moe.upcycle.tasks.label_facts import score_nothing
from dense2moe.upcycle.tasks.label_scores import (
    are_tags,
    average_entities,
    score_classes,
    score_entities,
    score_sets,
)
from dense2moe.upcycle.tasks.paired_error import accuracy_error, entity_error, rank_error, set_error
from dense2moe.upcycle.tasks.task import Batch, Task

_READ = (IDS, MASK, TYPES, PIXELS)


@dataclass(frozen=True)
class LabelLoss:
    """How labels are learned.

    smoothing: the share of a right label's probability that all labels get (Szegedy et al. 2016, section 7). weights:
    of each label, 1 in the mean over examples; none where empty, and of labels of which several may hold.
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] = ()


PLAIN = LabelLoss()


def label_task(name: LabelledTask, head: LabelHead, learned: LabelLoss = PLAIN) -> Task:
    """The task of a head with labels.

    `learned` is for training alone: held-out losses are plain, so that models compare whatever they learned by.
    """
    problem = describe_problem(name, head.labels, head.kind)

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        settings = learned if torch.is_grad_enabled() else PLAIN
        return problem.losses(logits, batch[LABELS], settings).mean()

    def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float, batch: Batch) -> torch.Tensor:
        return problem.divergences(logits, teacher.detach(), temperature, batch[LABELS]).mean()

    return Task(
        name=name,
        inputs=read_inputs,
        loss=loss,
        divergence=divergence,
        figures=problem.figures,
        unread={},
        decodes=False,
        answers=problem.answers,
        scores=problem.scores,
        paired_error=problem.error,
        head=head,
        stops_by_figure=True,
    )


@dataclass(frozen=True)
class Problem:
    """Losses [B] and divergences [B] of examples, their answers, and figures."""

    losses: Callable[[torch.Tensor, torch.Tensor, LabelLoss], torch.Tensor]
    divergences: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]
    answers: Callable[[torch.Tensor, Batch], list[LabelAnswer]]
    figures: Callable[[Sequence[float], Sequence[LabelAnswer]], tuple[Figure, ...]]
    scores: Callable[[Sequence[LabelAnswer]], Any]
    error: Callable[[Sequence[LabelAnswer], Sequence[LabelAnswer]], float]


def describe_problem(name: LabelledTask, labels: tuple[str, ...], kind: str | None) -> Problem:
    """How labels of a kind are learned, said and judged."""
    if name == "token-classification":
        said = (_token_losses, _token_divergences, _token_answers)
        if are_tags(labels):
            figures, scores = partial(_entity_figures, labels), partial(score_entities, labels=labels)
            return Problem(*said, figures, scores, partial(entity_error, labels=labels))
        return Problem(*said, _class_figures, partial(score_classes, labels=labels), accuracy_error)
    if kind == SEVERAL:
        figures, scores = partial(_set_figures, len(labels)), partial(score_sets, labels=labels)
        return Problem(_set_losses, _set_divergences, _set_answers, figures, scores, set_error)
    if kind == VALUE:
        return Problem(_value_losses, _value_divergences, _value_answers, value_figures, score_nothing, rank_error)
    scores = partial(score_classes, labels=labels)
    return Problem(_class_losses, _class_divergences, _class_answers, _class_figures, scores, accuracy_error)


def read_inputs(batch: Batch) -> dict[str, Any]:
    """What a model reads of a batch."""
    return {name: batch[name] for name in _READ if name in batch}


# One label of several.


def _class_losses(logits: torch.Tensor, labels: torch.Tensor, settings: LabelLoss) -> torch.Tensor:
    """Cross-entropy [B] of logits [B, labels]."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=settings.smoothing)
    return losses * losses.new_tensor(settings.weights)[labels] if settings.weights else losses


def _class_divergences(
    logits: torch.Tensor, teacher: torch.Tensor, temperature: float, _: torch.Tensor
) -> torch.Tensor:
    return _divergence(logits, teacher, temperature)


def _divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) over the last dimension, times the squared temperature."""
    student, wanted = ((each.float() / temperature).log_softmax(-1) for each in (logits, teacher))
    return (wanted.exp() * (wanted - student)).sum(-1) * temperature**2


def _class_answers(logits: torch.Tensor, batch: Batch) -> list[LabelAnswer]:
    said = logits.argmax(-1).tolist()
    return [LabelAnswer((given,), (right,)) for given, right in zip(said, batch[LABELS].tolist(), strict=True)]


def _class_figures(losses: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    said = [label for answer in answers for label in answer.said]
    right = [label for answer in answers for label in answer.right]
    accuracy = fmean(given == true for given, true in zip(said, right, strict=True))
    macro = float(f1_score(right, said, average="macro", zero_division=0.0))
    return (Figure("accuracy", accuracy, "", "higher"), Figure("macro F1", macro, "", "higher"), _loss_figure(losses))


def _loss_figure(losses: Sequence[float]) -> Figure:
    return Figure("loss", fmean(losses), "nats", "lower")


# Labels of words: at the first piece of each, UNLABELLED elsewhere.


def _token_losses(logits: torch.Tensor, labels: torch.Tensor, settings: LabelLoss) -> torch.Tensor:
    """Mean cross-entropy [B] over labelled tokens of logits [B, S, labels]."""
    real = labels != UNLABELLED
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, reduction="none", label_smoothing=settings.smoothing
    )
    if settings.weights:
        losses = losses * losses.new_tensor(settings.weights)[labels.clamp(min=0)]
    return (losses * real).sum(-1) / real.sum(-1).clamp(min=1)


def _token_divergences(
    logits: torch.Tensor, teacher: torch.Tensor, temperature: float, labels: torch.Tensor
) -> torch.Tensor:
    real = labels != UNLABELLED
    return (_divergence(logits, teacher, temperature) * real).sum(-1) / real.sum(-1).clamp(min=1)


def _token_answers(logits: torch.Tensor, batch: Batch) -> list[LabelAnswer]:
    labels = batch[LABELS]
    real, said = labels != UNLABELLED, logits.argmax(-1)
    return [
        LabelAnswer(tuple(said[row][real[row]].tolist()), tuple(labels[row][real[row]].tolist()))
        for row in range(len(labels))
    ]


def _entity_figures(
    labels: Sequence[str], losses: Sequence[float], answers: Sequence[LabelAnswer]
) -> tuple[Figure, ...]:
    found = average_entities(answers, labels)
    return (
        Figure("entity F1", found.f1, "", "higher"),
        Figure("precision", found.precision, "", "higher"),
        Figure("recall", found.recall, "", "higher"),
        _loss_figure(losses),
    )


# Any number of labels, each 0 or 1.


def _set_losses(logits: torch.Tensor, labels: torch.Tensor, settings: LabelLoss) -> torch.Tensor:
    """Mean binary cross-entropy [B] of logits [B, labels].

    What is smoothed goes to both outcomes of a label.
    """
    wanted = labels.float() * (1 - settings.smoothing) + settings.smoothing / 2
    return F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(-1)


def _set_divergences(logits: torch.Tensor, teacher: torch.Tensor, temperature: float, _: torch.Tensor) -> torch.Tensor:
    """Divergence of each label's own two outcomes, averaged as the loss is."""

    def pair(each: torch.Tensor) -> torch.Tensor:
        return torch.stack([each, torch.zeros_like(each)], -1)

    return _divergence(pair(logits), pair(teacher), temperature).mean(-1)


def _set_answers(logits: torch.Tensor, batch: Batch) -> list[LabelAnswer]:
    return [
        LabelAnswer(
            tuple(torch.nonzero(given > 0).flatten().tolist()), tuple(torch.nonzero(right > 0.5).flatten().tolist())
        )
        for given, right in zip(logits, batch[LABELS], strict=True)
    ]


def _set_figures(num_labels: int, losses: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    right, said = (
        [[number in side for number in range(num_labels)] for side in sides]
        for sides in ([answer.right for answer in answers], [answer.said for answer in answers])
    )
    micro, macro = (float(f1_score(right, said, average=each, zero_division=0.0)) for each in ("micro", "macro"))
    exact = fmean(answer.said == answer.right for answer in answers)
    return (
        Figure("micro F1", micro, "", "higher"),
        Figure("macro F1", macro, "", "higher"),
        Figure("exact match", exact, "", "higher"),
        _loss_figure(losses),
    )


# Values.


def _value_losses(logits: torch.Tensor, labels: torch.Tensor, _: LabelLoss) -> torch.Tensor:
    """Squared error [B], the mean over outputs [B, outputs]."""
    return (logits.float() - labels.float().view(logits.shape)).square().flatten(1).mean(-1)


def _value_divergences(logits: torch.Tensor, teacher: torch.Tensor, _: float, __: torch.Tensor) -> torch.Tensor:
    return (logits.float() - teacher.float()).square().flatten(1).mean(-1)


def _value_answers(logits: torch.Tensor, batch: Batch) -> list[LabelAnswer]:
    rights = batch[LABELS].view(logits.shape).tolist()
    return [LabelAnswer(tuple(given), tuple(right)) for given, right in zip(logits.tolist(), rights, strict=True)]


def value_figures(losses: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    """Spearman's correlation of values said and right, and their squared error."""
    said, right = ([side[0] for side in sides] for sides in zip(*((a.said, a.right) for a in answers), strict=True))
    is_constant = len(set(said)) == 1 or len(set(right)) == 1
    correlation = 0.0 if is_constant else float(spearmanr(said, right).statistic)
    return (Figure("rank correlation", correlation, "", "higher"), Figure("squared error", fmean(losses), "", "lower"))
