"""A task: what a model is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dense2moe.upcycle.tasks.answer import AnyAnswer
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.head import LabelHead
from dense2moe.upcycle.tasks.label_facts import LabelScores, score_nothing
from dense2moe.upcycle.tasks.model_class import find_model_class

Batch = Mapping[str, torch.Tensor]
"""Tensors of several examples by name, the first dimension of each their number."""


def take_logits(output: Any) -> torch.Tensor:
    """The logits of a model's output."""
    logits: torch.Tensor = output.logits
    return logits


def answer_nothing(_: torch.Tensor, __: Batch) -> list[AnyAnswer]:
    """No answers: the task is judged by its loss."""
    return []


def keep_answers(answers: Sequence[AnyAnswer]) -> Sequence[AnyAnswer]:
    """The same answers: each example is one by itself."""
    return answers


def know_no_error(_: Sequence[AnyAnswer], __: Sequence[AnyAnswer]) -> float:
    """No standard error, of a task without answers."""
    return 0.0


@dataclass(frozen=True)
class Jointly:
    """How examples are judged that say something beside one another alone.

    keep: what is kept of predictions for a batch, [B, ...]. judge: the loss of every example, and its answer, from what
    was kept of all of them, [N, ...], and their labels.
    """

    keep: Callable[[torch.Tensor, Batch], torch.Tensor]
    judge: Callable[[torch.Tensor, torch.Tensor], tuple[list[float], list[AnyAnswer]]]


@dataclass(frozen=True)
class Task:
    """What a model predicts, its training loss and its figures.

    name: the task's name at Hugging Face, which says which auto class loads its models.
    inputs: what a model is called with, from a batch.
    loss: the mean loss of predictions [B, ...] for a batch, a scalar: the mean over examples.
    divergence: how far predictions are from a teacher's for a batch, at a temperature; a scalar to be mixed with the
    loss.
    figures: what a model is judged by, the most important first, from losses and answers of examples.
    unread: more arguments for a pass whose predictions nobody reads.
    decodes: whether a model says one token after the other; else its speed is that of a pass.
    predictions: what is read of a model's output.
    answers: what predictions [B, ...] say, one answer an example.
    join: the answers of several examples that belong together as one; figures, scores and error do so themselves.
    scores: how answers are right label by label; None of a task without labels.
    paired_error: the standard error of the difference of two models' first figures, from their answers.
    head: the labels, of a task that has some.
    jointly: how held-out examples are judged together; None where each is by itself.
    stops_by_figure: whether the best weights are those of the best first figure, and not of the lowest loss.
    """

    name: str
    inputs: Callable[[Batch], dict[str, Any]]
    loss: Callable[[torch.Tensor, Batch], torch.Tensor]
    divergence: Callable[[torch.Tensor, torch.Tensor, float, Batch], torch.Tensor]
    figures: Callable[[Sequence[float], Sequence[AnyAnswer]], tuple[Figure, ...]]
    unread: Mapping[str, Any]
    decodes: bool = True
    predictions: Callable[[Any], torch.Tensor] = take_logits
    answers: Callable[[torch.Tensor, Batch], list[AnyAnswer]] = answer_nothing
    join: Callable[[Sequence[AnyAnswer]], Sequence[AnyAnswer]] = keep_answers
    scores: Callable[[Sequence[AnyAnswer]], LabelScores | None] = score_nothing
    paired_error: Callable[[Sequence[AnyAnswer], Sequence[AnyAnswer]], float] = know_no_error
    head: LabelHead | None = None
    jointly: Jointly | None = None
    stops_by_figure: bool = False

    @property
    def model_class(self) -> Any:
        """The auto class of transformers that loads models for this task."""
        return find_model_class(self.name)
