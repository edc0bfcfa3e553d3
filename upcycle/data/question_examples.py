"""Questions as examples: a row a window, and texts to judge by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.windows import OUTSIDE_CONTEXT, Window, encode_question
from dense2moe.upcycle.data.config import DataConfig
from dense2moe.upcycle.data.encoded import Encoded, pad
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.questions import QuestionRow
from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.tasks.asked import Asked, Question
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, QUESTIONS, SPAN_ENDS, SPAN_STARTS, TYPES
from dense2moe.upcycle.tasks.spans import LONGEST_ANSWER

QUESTIONS_NAME = "questions.json"
JUDGED = (SPAN_STARTS, SPAN_ENDS, QUESTIONS)
"""Tensors that only held-out examples need."""


@dataclass(frozen=True)
class QuestionEncoder:
    """What makes windows of questions.

    filling: the id of padding.
    """

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    filling: int

    def __call__(self, rows: Sequence[QuestionRow]) -> Encoded:
        """Every window of `rows`, a row each.

        `labels` int32 [N, 2] are the places of the answer's first and last token; `span_starts`,
        `span_ends` int32 [N, S] and `questions` int64 [N] are for held-out examples alone.

        Raises:
            UpcycleError: a question has no windows; see `encode_question`.
        """
        windows = [self._encode(row) for row in rows]
        owners = [number for number, own in enumerate(windows) for _ in own]
        flat = [window for own in windows for window in own]
        found = [find_answer(rows[owner], window) for owner, window in zip(owners, flat, strict=True)]
        length, outside = max(len(window.ids) for window in flat), OUTSIDE_CONTEXT
        tensors = {
            IDS: pad([window.ids for window in flat], length, self.filling),
            MASK: pad([[1] * len(window.ids) for window in flat], length, 0),
            LABELS: torch.tensor([ends or (window.none,) * 2 for ends, window in zip(found, flat, strict=True)]).int(),
            SPAN_STARTS: pad([[start for start, _ in window.spans] for window in flat], length, outside[0]),
            SPAN_ENDS: pad([[end for _, end in window.spans] for window in flat], length, outside[1]),
            QUESTIONS: torch.tensor([rows[owner].number for owner in owners]),
        }
        if flat[0].types:
            tensors[TYPES] = pad([window.types for window in flat], length, 0)
        answered = {owner for owner, ends in zip(owners, found, strict=True) if ends is not None}
        return Encoded(
            tensors,
            int(tensors[MASK].sum()),
            sum(bool(row.answers) and number not in answered for number, row in enumerate(rows)),
            length,
            longest_answer=max((last - first + 1 for first, last in filter(None, found)), default=0),
        )

    def _encode(self, row: QuestionRow) -> tuple[Window, ...]:
        most = self.config.block_size
        overlap = most // 3 if self.config.stride is None else self.config.stride
        return encode_question(self.tokenizer, row.question, row.context, most, overlap, row.where)


def find_answer(row: QuestionRow, window: Window) -> tuple[int, int] | None:
    """The first and last token of a question's first answer.

    None where it has none, or the window does not have it whole.
    """
    if not row.answers:
        return None
    answer = row.answers[0]
    start = row.starts[0] + len(answer) - len(answer.lstrip())
    return window.find(start, start + len(answer.strip()))


# The texts


def write_questions(rows: Mapping[Split, Sequence[QuestionRow]], longest: int, output: Path) -> None:
    """Write contexts and answers of held-out questions, by number.

    Rows of one question and context are one question, with all their answers. longest: tokens of the longest answer of
    the training split.
    """
    held_out = [row for split in SPLITS[1:] for row in rows[split]]
    contexts = {context: number for number, context in enumerate(dict.fromkeys(row.context for row in held_out))}
    right: dict[int, tuple[int, dict[str, None]]] = {}
    for row in held_out:
        right.setdefault(row.number, (contexts[row.context], {}))[1].update(dict.fromkeys(row.answers))
    told = {
        "may_lack": any(not row.answers for split in SPLITS for row in rows[split]),
        "longest_answer": max(longest, LONGEST_ANSWER),
        "contexts": list(contexts),
        "questions": {number: [context, *answers] for number, (context, answers) in right.items()},
    }
    (output / QUESTIONS_NAME).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def read_asked(directory: Path) -> Asked:
    """The held-out questions that `write_questions` wrote.

    Raises:
        UpcycleError: there are none, or the file is damaged.
    """
    file = directory / QUESTIONS_NAME
    with one_line_errors(file, "cannot be read", "give the directory that prepare_data wrote"):
        told = json.loads(file.read_text(encoding="utf-8"))
        questions = {
            int(number): Question(told["contexts"][context], tuple(right))
            for number, (context, *right) in told["questions"].items()
        }
        return Asked(questions, told["may_lack"], told["longest_answer"])
