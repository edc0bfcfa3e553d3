"""Answers to questions, by a package that scores ends of stretches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.runtime.predictions import FoundAnswer, Prediction
from dense2moe.export.runtime.text_pass import TextPass
from dense2moe.upcycle.checkpoints.windows import Window, encode_question
from dense2moe.upcycle.errors import shorten
from dense2moe.upcycle.tasks.answer import WindowAnswer
from dense2moe.upcycle.tasks.questions import choose_window, read_window
from dense2moe.upcycle.tasks.spans import LONGEST_ANSWER, mask_ends

_BATCH = 8  # windows
_OVERLAP = 0.25  # of a window


@dataclass
class AnswerReader:
    """Reads answers to questions.

    may_lack: whether nothing is said where no answer is likelier, as of models that learned such questions. longest:
    most tokens of an answer.
    """

    text_pass: TextPass
    may_lack: bool = False
    longest: int = LONGEST_ANSWER

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """Answers to questions in their order; second texts are contexts.

        Raises:
            ExportError: there are no contexts.
            UpcycleError: a question leaves no room for its context.
        """
        if pairs is None:
            raise ExportError(f"{self.text_pass.directory}: answers questions; give each with its context")
        for question, context in zip(texts, pairs, strict=True):
            yield Prediction(question, answer=self._answer(question, context))

    def _answer(self, question: str, context: str) -> FoundAnswer:
        """The best answer of all windows of a question."""
        most = self.text_pass.most_tokens
        where = f"question '{shorten(question)}'"
        windows = encode_question(self.text_pass.tokenizer, question, context, most, int(most * _OVERLAP), where)
        found: list[WindowAnswer] = []
        totals: list[float] = []  # by which scores become probabilities
        for window, logits in self._run(windows):
            found.append(read_window(len(found), logits, torch.tensor(window.spans), self.longest))
            totals.append(float(logits.logsumexp(-1).sum()))
        best = choose_window(found, self.may_lack)
        if best is None:
            none = min(found, key=lambda each: each.none)
            return FoundAnswer("", 0, 0, _share(none.none, totals[none.question]))
        text = context[best.start : best.end]
        start = best.start + len(text) - len(text.lstrip())
        return FoundAnswer(text.strip(), start, start + len(text.strip()), _share(best.score, totals[best.question]))

    def _run(self, windows: Sequence[Window]) -> Iterator[tuple[Window, torch.Tensor]]:
        """Windows with the logits [2, S] of their ends, without padding."""
        for begin in range(0, len(windows), _BATCH):
            some = windows[begin : begin + _BATCH]
            outputs = self.text_pass.run(some)
            ends = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
            for window, logits in zip(some, ends, strict=True):
                size = len(window.ids)
                yield window, mask_ends(logits[None, :, :size], torch.ones(1, size))[0]


def _share(score: float, total: float) -> float:
    """The probability of both ends, from their logits and the total."""
    return float(torch.tensor(score - total).exp())


def open_answers(text_pass: TextPass) -> AnswerReader:
    """A reader of answers."""
    return AnswerReader(text_pass)
