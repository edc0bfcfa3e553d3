"""The task of answering questions with a stretch of their context.

An example is a window: a question with a stretch of the context (`dense2moe.upcycle.checkpoints.windows`). The loss of
one is the mean of two cross-entropies, of the answer's first and last token, as transformers' heads have it; padding is
never a place. A window that does not have the whole answer is labelled with the token that stands for none. Figures are
of questions: of all windows of one the best stretch is said, or nothing where the least score of no answer is higher
(Devlin et al. 2019, section 4.3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from dense2moe.upcycle.tasks.answer import LabelAnswer, TextAnswer, WindowAnswer
from dense2moe.upcycle.tasks.answer_scores import answers_error, average_answers, match_exactly, match_words
from dense2moe.upcycle.tasks.asked import Asked
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, QUESTIONS, SPAN_ENDS, SPAN_STARTS, TYPES
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.head import ANSWERING, ENDS, ENDS_OF_SPAN, LabelHead
from dense2moe.upcycle.tasks.label_facts import LabelScores
from dense2moe.upcycle.tasks.label_scores import score_classes
from dense2moe.upcycle.tasks.spans import find_best_span, mask_ends, score_none
from dense2moe.upcycle.tasks.task import Batch, Task

QUESTION_HEAD = LabelHead(ENDS, ENDS_OF_SPAN)
_READ = (IDS, MASK, TYPES)
_ANSWERED = ("answer", "no answer")


def question_task(asked: Asked, head: LabelHead = QUESTION_HEAD) -> Task:
    """The task of answering `asked`."""

    def answers(logits: torch.Tensor, batch: Batch) -> list[WindowAnswer]:
        masked = mask_ends(logits, batch[MASK])
        numbers, places = batch[QUESTIONS].tolist(), torch.stack([batch[SPAN_STARTS], batch[SPAN_ENDS]], -1)
        return [
            read_window(number, ends, spans, asked.longest)
            for number, ends, spans in zip(numbers, masked.cpu(), places.cpu(), strict=True)
        ]

    def join(answers: Sequence[WindowAnswer]) -> list[TextAnswer]:
        return join_windows(answers, asked)

    def figures(losses: Sequence[float], answers: Sequence[WindowAnswer]) -> tuple[Figure, ...]:
        said = join(answers)
        return (
            Figure("answer F1", average_answers(said, match_words), "", "higher"),
            Figure("exact match", average_answers(said, match_exactly), "", "higher"),
            Figure("loss", fmean(losses), "nats", "lower"),
        )

    def scores(answers: Sequence[WindowAnswer]) -> LabelScores | None:
        return _score_lacking(join(answers)) if asked.may_lack else None

    return Task(
        name=ANSWERING,
        inputs=_inputs,
        loss=_loss,
        divergence=_divergence,
        figures=figures,
        unread={},
        decodes=False,
        predictions=take_ends,
        answers=answers,
        join=join,
        scores=scores,
        paired_error=lambda found, other: answers_error(join(found), join(other)),
        head=head,
        stops_by_figure=True,
    )


def take_ends(output: Any) -> torch.Tensor:
    """A model's logits [B, 2, S] of first and last tokens."""
    return torch.stack([output.start_logits, output.end_logits], 1)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in _READ if name in batch}


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of first and last tokens [B, 2]."""
    return F.cross_entropy(mask_ends(logits, batch[MASK]).flatten(0, 1), batch[LABELS].flatten())


def _divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float, batch: Batch) -> torch.Tensor:
    """Mean KL(teacher || student) over ends, times the squared temperature."""
    student, wanted = (
        (mask_ends(each, batch[MASK]) / temperature).log_softmax(-1) for each in (logits, teacher.detach())
    )
    return (wanted.exp() * (wanted - student)).sum(-1).mean() * temperature**2


def read_window(number: int, logits: torch.Tensor, spans: torch.Tensor, longest: int) -> WindowAnswer:
    """What logits [2, S] of a window say to question `number`.

    `spans` [S, 2] and `longest` as in `find_best_span`.
    """
    score, first, last = find_best_span(logits, spans, longest)
    return WindowAnswer(number, score_none(logits, spans), score, int(spans[first, 0]), int(spans[last, 1]))


def join_windows(answers: Sequence[WindowAnswer], asked: Asked) -> list[TextAnswer]:
    """What is said to each question, in the order of their numbers."""
    windows: dict[int, list[WindowAnswer]] = defaultdict(list)
    for answer in answers:
        windows[answer.question].append(answer)
    said = []
    for number, own in sorted(windows.items()):
        question, best = asked.questions[number], choose_window(own, asked.may_lack)
        text = "" if best is None else question.context[best.start : best.end].strip()
        said.append(TextAnswer(text, question.right))
    return said


def choose_window(windows: Sequence[WindowAnswer], may_lack: bool) -> WindowAnswer | None:
    """The window with the best answer; None where none is likelier."""
    best = max(windows, key=lambda window: window.score)
    return None if may_lack and min(window.none for window in windows) > best.score else best


def _score_lacking(answers: Sequence[TextAnswer]) -> LabelScores:
    """How well a model knows which questions have an answer."""
    known = [LabelAnswer((float(not answer.said),), (float(not answer.right),)) for answer in answers]
    return score_classes(known, _ANSWERED)
