"""Answers of the package beside the twin's and the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig

from dense2moe.export.opening import load_tokenizer
from dense2moe.export.parity.answers.examples import Answer, MultipleChoice, Similarity, TaskFile
from dense2moe.export.parity.answers.outcome import (
    EncodedTask,
    Ids,
    Model,
    ModelAnswer,
    PackageModel,
    TorchModel,
    answer_task,
    encode_task,
    written_gap,
)
from dense2moe.export.parity.answers.scores import (
    answer_f1,
    is_exact,
    macro_f1,
    mean_difference_error,
    rank_correlation,
    rank_correlation_error,
)
from dense2moe.export.parity.forward import Reference, run_package
from dense2moe.export.parity.limits import gap_limit
from dense2moe.export.parity.records import Limit, TaskCheck
from dense2moe.export.parity.ties import find_flips
from dense2moe.export.rotary import rotary_switch
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.generation import read_generation


class TaskEvaluation:
    """The tasks of one package.

    Its own answers, those of the fine-tuned model if asked, and in the end those of the twin.
    """

    def __init__(
        self, directory: Path, tasks: Sequence[TaskFile], decoder: Decoder, num_examples: int, answer_tokens: int
    ) -> None:
        """Ask the package; the tokenizer is in `directory`.

        Raises:
            ExportError: no tokenizer there, or an example does not fit into the context.
        """
        self.decoder, self.answer_tokens = decoder, answer_tokens
        self.tokenizer = load_tokenizer(directory) if tasks else None
        self.encoded = self._encode(directory, [task.cut(num_examples) for task in tasks]) if tasks else []
        self.found = self._ask(PackageModel(decoder))
        self.tuned: list[list[ModelAnswer] | None] | None = None

    def _encode(self, directory: Path, tasks: Sequence[TaskFile]) -> list[EncodedTask]:
        switch = rotary_switch(AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False))
        generation = read_generation(directory, self.tokenizer)
        return [
            encode_task(task, self.tokenizer, generation, self.decoder.context_length, self.answer_tokens, switch)
            for task in tasks
        ]

    def ask_finetuned(self, reference: Reference) -> None:
        """Ask the fine-tuned model, where it is not the twin."""
        self.tuned = self._ask(TorchModel(reference))

    def check(self, twin: Reference, limits: Mapping[str, Limit], tie_margin: float) -> tuple[TaskCheck | str, ...]:
        """Ask the twin, and compare all answers.

        An impossible task becomes a sentence.
        """
        own = self._ask(TorchModel(twin))
        checks: list[TaskCheck | str] = []
        for encoded, found, of_twin, of_tuned in zip(self.encoded, self.found, own, self.tuned or own, strict=True):
            if found is None or of_twin is None or of_tuned is None:
                checks.append(f"not run: '{encoded.task.name}' compares hidden states, and the package shows none")
            else:
                is_flip = partial(_flips, decoder=self.decoder, twin=twin, tie_margin=tie_margin)
                answers = TaskAnswers(encoded, found, of_twin, of_tuned)
                gaps = _gaps(encoded, found, of_twin, twin)
                checks.append(compare_task(answers, gaps, gap_limit(encoded.task.kind, limits), is_flip))
        return tuple(checks)

    def _ask(self, model: Model) -> list[list[ModelAnswer] | None]:
        return [answer_task(model, encoded, self.tokenizer, self.answer_tokens) for encoded in self.encoded]


def score_task(task: TaskFile, outcomes: Sequence[ModelAnswer]) -> dict[str, float]:
    """A model's scores by name, the judged score first."""
    match task.kind:
        case "choice":
            examples = cast("tuple[MultipleChoice, ...]", task.examples)
            right, chosen = [example.right for example in examples], [outcome.chosen for outcome in outcomes]
            scores = {"accuracy": _mean(_points(task, outcomes))}
            if len({example.choices for example in examples}) == 1:
                scores["macro F1"] = macro_f1(chosen, right)
            return scores
        case "answer":
            answers = cast("tuple[Answer, ...]", task.examples)
            exact = [
                float(is_exact(outcome.text, example.right)) for outcome, example in zip(outcomes, answers, strict=True)
            ]
            return {"F1": _mean(_points(task, outcomes)), "exact match": _mean(exact)}
        case "similarity":
            return {"Spearman's correlation": rank_correlation(_points(task, outcomes), _given(task))}


@dataclass(frozen=True)
class TaskAnswers:
    """A task, and the answers of three models.

    Of the package (`found`), of the twin (`own`) and of the fine-tuned model (`tuned`).
    """

    encoded: EncodedTask
    found: Sequence[ModelAnswer]
    own: Sequence[ModelAnswer]
    tuned: Sequence[ModelAnswer]


def compare_task(
    answers: TaskAnswers, all_gaps: Iterable[float], limit: Limit | None, is_flip: Callable[[Sequence[Ids]], bool]
) -> TaskCheck:
    """One task done by three models.

    `all_gaps`: by example, how far the twin prefers its own answer. A gap beyond the limit does not count where the
    example's texts flip experts at a near-tie, as `is_flip` says.
    """
    encoded, found, own, tuned = answers.encoded, answers.found, answers.own, answers.tuned
    task = encoded.task
    package, finetuned = score_task(task, found), score_task(task, tuned)
    gaps, num_flips = {}, 0
    for number, gap in enumerate(all_gaps, 1):
        if limit is not None and not gap <= limit.value and is_flip(_texts(encoded, number - 1, own)):
            num_flips += 1
        else:
            gaps[number] = gap
    worst = max(gaps, key=gaps.__getitem__, default=None)
    metric = next(iter(package))
    return TaskCheck(
        task.name,
        task.kind,
        len(task.examples),
        metric,
        package,
        score_task(task, own),
        finetuned,
        package[metric] - finetuned[metric],
        _error(task, found, tuned),
        _same(task, found, own),
        _same(task, found, tuned),
        0.0 if worst is None else gaps[worst],
        worst if worst is not None and gaps[worst] > 0 else None,
        num_flips,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _given(task: TaskFile) -> list[float]:
    return [example.score for example in cast("tuple[Similarity, ...]", task.examples)]


def _points(task: TaskFile, outcomes: Sequence[ModelAnswer]) -> list[float]:
    """Each example's contribution to the judged score.

    For texts to be compared, how alike the model finds them.
    """
    points = []
    for example, outcome in zip(task.examples, outcomes, strict=True):
        match example:
            case MultipleChoice():
                points.append(float(outcome.chosen == example.right))
            case Answer():
                points.append(answer_f1(outcome.text, example.right))
            case Similarity():
                points.append(outcome.values[0])
    return points


def _error(task: TaskFile, found: Sequence[ModelAnswer], other: Sequence[ModelAnswer]) -> float:
    """Standard error of the difference of two models' scores."""
    if task.kind == "similarity":
        return rank_correlation_error(_points(task, found), _points(task, other), _given(task))
    return mean_difference_error(_points(task, found), _points(task, other))


def _same(task: TaskFile, found: Sequence[ModelAnswer], other: Sequence[ModelAnswer]) -> float | None:
    answer: dict[str, Callable[[ModelAnswer], object]] = {
        "choice": lambda outcome: outcome.chosen,
        "answer": lambda outcome: outcome.text,
    }
    if task.kind == "similarity":
        return None
    return _mean([float(answer[task.kind](a) == answer[task.kind](b)) for a, b in zip(found, other, strict=True)])


def _gaps(
    encoded: EncodedTask, found: Sequence[ModelAnswer], own: Sequence[ModelAnswer], twin: Reference
) -> Iterator[float]:
    for rows, a, b in zip(encoded.rows, found, own, strict=True):
        match encoded.task.kind:
            case "choice":
                yield (b.values[b.chosen] - b.values[a.chosen]) / b.scale
            case "answer":
                yield written_gap(twin, rows[0].ids, a.ids, b.ids) if a.text != b.text else 0.0
            case "similarity":
                yield abs(a.values[0] - b.values[0]) / b.scale


def _texts(encoded: EncodedTask, place: int, own: Sequence[ModelAnswer]) -> list[Ids]:
    """All texts that the twin read for an example."""
    return [row.fed if encoded.task.kind == "choice" else row.ids + own[place].ids for row in encoded.rows[place]]


def _flips(texts: Sequence[Ids], decoder: Decoder, twin: Reference, tie_margin: float) -> bool:
    """Whether a near-tie sent some token to other experts."""
    for text in texts:
        ids = torch.tensor([text])
        mask = torch.ones_like(ids)
        found = run_package(decoder, ids, mask, ids.shape[1])
        own = twin.forward(ids, mask).seen_by(found)
        if find_flips(found.routers, own.routers, found.hiddens, own.hiddens, mask, own.choice, tie_margin).any():
            return True
    return False
