"""Several tasks with labels at once: one trunk, and a head each.

The heads are rows of one matrix: a head of tokens, whose labels are the tasks' labels behind one another. Labels of
words are read at the words, the label of a text at its first token (BERT, Devlin et al. 2019, section 4.1), or at its
last where the model reads forward only. A task learns from its own examples, by a softmax over its own labels, as it
would alone; a batch holds examples of all tasks, and its loss is the mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import LABELS, MASK, PARTS, labels_of
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.head import OF_WORDS, HeadPart, LabelHead, TokenPlace
from dense2moe.upcycle.tasks.label_facts import Confusion, LabelScores
from dense2moe.upcycle.tasks.labels import PLAIN, LabelLoss, Problem, describe_problem, read_inputs
from dense2moe.upcycle.tasks.task import Batch, Task

MEAN = "mean of tasks"
"""The first figure: the mean of the tasks' own first figures."""


def several_tasks(head: LabelHead, learned: LabelLoss = PLAIN) -> Task:
    """The task that several tasks with one head make together.

    `learned` is for training alone, its weights those of the head's labels.
    """
    tasks = _Tasks(tuple(_list_parts(head, learned)), head.place)
    return Task(
        name=OF_WORDS,
        inputs=read_inputs,
        loss=tasks.loss,
        divergence=tasks.divergence,
        figures=tasks.figures,
        unread={},
        decodes=False,
        answers=tasks.answers,
        scores=tasks.scores,
        paired_error=tasks.paired_error,
        head=head,
        stops_by_figure=True,
    )


def slice_labels(parts: Sequence[HeadPart]) -> Iterator[tuple[HeadPart, slice]]:
    """Which of the head's labels each task has."""
    start = 0
    for part in parts:
        yield part, slice(start, start := start + len(part.labels))


def take_text(logits: torch.Tensor, lengths: torch.Tensor, place: TokenPlace) -> torch.Tensor:
    """Logits of whole texts [B, labels], of logits [B, S, labels].

    `lengths` [B]: real tokens of each text.
    """
    rows = torch.arange(len(logits), device=logits.device)
    return logits[:, 0] if place == "first" else logits[rows, lengths - 1]


@dataclass(frozen=True)
class _Part:
    """One of the tasks: its number, and its labels in the head."""

    number: int
    part: HeadPart
    columns: slice
    problem: Problem
    learned: LabelLoss

    @property
    def name(self) -> str:
        return self.part.name


def _list_parts(head: LabelHead, learned: LabelLoss) -> Iterator[_Part]:
    for number, (part, columns) in enumerate(slice_labels(head.parts)):
        problem = describe_problem(part.task, part.labels, part.kind)
        yield _Part(number, part, columns, problem, replace(learned, weights=learned.weights[columns]))


@dataclass(frozen=True)
class _Tasks:
    """What a `Task` asks, asked of each task by its own examples."""

    parts: tuple[_Part, ...]
    place: TokenPlace

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        learns = torch.is_grad_enabled()
        losses = [
            part.problem.losses(own, labels[LABELS], part.learned if learns else PLAIN)
            for part, _, own, labels in self._divide(logits, batch)
        ]
        return torch.cat(losses).mean()

    def divergence(self, logits: torch.Tensor, teacher: torch.Tensor, temperature: float, batch: Batch) -> torch.Tensor:
        found = [
            part.problem.divergences(own, self._read(part, teacher.detach(), batch)[rows], temperature, labels[LABELS])
            for part, rows, own, labels in self._divide(logits, batch)
        ]
        return torch.cat(found).mean()

    def answers(self, logits: torch.Tensor, batch: Batch) -> list[LabelAnswer]:
        found: dict[int, LabelAnswer] = {}
        for part, rows, own, labels in self._divide(logits, batch):
            said = (replace(answer, part=part.number) for answer in part.problem.answers(own, labels))
            found |= dict(zip(rows.tolist(), said, strict=True))
        return [found[row] for row in range(len(logits))]

    def figures(self, losses: Sequence[float], answers: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
        by_task = {
            part.name: part.problem.figures([losses[place] for place in places], [answers[place] for place in places])
            for part, places in self._places(answers)
        }
        mean = fmean(figures[0].value for figures in by_task.values())
        told = (
            replace(figure, name=f"{name}: {figure.name}") for name, figures in by_task.items() for figure in figures
        )
        return (Figure(MEAN, mean, "", "higher"), *told)

    def scores(self, answers: Sequence[LabelAnswer]) -> LabelScores | None:
        found = [
            _rename(part.name, own)
            for part, places in self._places(answers)
            if (own := part.problem.scores([answers[place] for place in places])) is not None
        ]
        if not found:
            return None
        confusions = sorted((each for own in found for each in own.confusions), key=lambda each: -each.count)
        return LabelScores(tuple(score for own in found for score in own.scores), tuple(confusions))

    def paired_error(self, found: Sequence[LabelAnswer], other: Sequence[LabelAnswer]) -> float:
        """Tasks have examples of their own, so their errors are independent."""
        errors = [
            part.problem.error([found[place] for place in places], [other[place] for place in places])
            for part, places in self._places(found)
        ]
        return math.hypot(*errors) / len(errors)

    def _read(self, part: _Part, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        own = logits[..., part.columns]
        return own if part.part.task == OF_WORDS else take_text(own, batch[MASK].sum(-1), self.place)

    def _divide(
        self, logits: torch.Tensor, batch: Batch
    ) -> Iterator[tuple[_Part, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """Each task in a batch: its rows, logits and labels."""
        for part in self.parts:
            rows = torch.nonzero(batch[PARTS] == part.number).flatten()
            if len(rows):
                labels = batch[labels_of(part.number)][rows]
                yield part, rows, self._read(part, logits, batch)[rows], {LABELS: labels}

    def _places(self, answers: Sequence[LabelAnswer]) -> Iterator[tuple[_Part, list[int]]]:
        """Of each task that has answers, their places."""
        for part in self.parts:
            if places := [place for place, answer in enumerate(answers) if answer.part == part.number]:
                yield part, places


def _rename(task: str, found: LabelScores) -> LabelScores:
    """Scores whose labels are named with their task."""
    scores = (replace(score, name=f"{task}/{score.name}") for score in found.scores)
    confusions = (Confusion(f"{task}/{each.right}", f"{task}/{each.said}", each.count) for each in found.confusions)
    return LabelScores(tuple(scores), tuple(confusions))
