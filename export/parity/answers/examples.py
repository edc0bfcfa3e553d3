"""Files of task examples with correct answers, one JSON object a line.

    choice       {"prompt": "...", "choices": ["...", "..."], "answer": "..."}   the likeliest of some texts; accuracy
    answer       {"prompt": "...", "answer": "..."}               what the model writes greedily; F1 and exact match
    similarity   {"texts": ["...", "..."], "score": 3.5}          how alike two texts are; Spearman's correlation

The answer of a choice is its text, or its place from 0 on. A written answer ends at `until`, a newline if not given,
and "answer" may be a list of right ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

from pydantic import Field, ValidationError, model_validator

from dense2moe.export.blocks import choose_places
from dense2moe.export.errors import ExportError
from dense2moe.export.parity.records import TaskKind
from dense2moe.upcycle.record import Record

_Text = Annotated[str, Field(min_length=1)]


class MultipleChoice(Record):
    """A prompt, texts that may follow it, and the correct one."""

    prompt: str
    choices: Annotated[tuple[_Text, ...], Field(strict=False, min_length=2)]
    answer: int | str

    @model_validator(mode="after")
    def _check_answer(self) -> MultipleChoice:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices has a text twice; must have each once")
        if self.answer not in (range(len(self.choices)) if isinstance(self.answer, int) else self.choices):
            raise ValueError(
                f"answer is {self.answer!r}; must be one of the choices, or its place, 0 to {len(self.choices) - 1}"
            )
        return self

    @property
    def right(self) -> int:
        """The index of the correct text."""
        return self.answer if isinstance(self.answer, int) else self.choices.index(self.answer)


class Answer(Record):
    """A prompt and its correct answers: texts that end at `until`."""

    prompt: _Text
    answer: _Text | Annotated[tuple[_Text, ...], Field(strict=False, min_length=1)]
    until: _Text = "\n"

    @property
    def right(self) -> tuple[str, ...]:
        """All correct answers."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer


class Similarity(Record):
    """Two texts, and people's similarity score for them, on any scale."""

    texts: Annotated[tuple[_Text, _Text], Field(strict=False)]
    score: Annotated[float, Field(strict=False, allow_inf_nan=False)]


Example: TypeAlias = MultipleChoice | Answer | Similarity
_KINDS: dict[TaskKind, type[MultipleChoice] | type[Answer] | type[Similarity]] = {
    "choice": MultipleChoice,
    "answer": Answer,
    "similarity": Similarity,
}


@dataclass(frozen=True)
class TaskFile:
    """Examples of one kind; its name is the file's."""

    name: str
    kind: TaskKind
    examples: tuple[Example, ...]

    def cut(self, most: int) -> TaskFile:
        """At most `most` of its examples, taken evenly."""
        return TaskFile(
            self.name, self.kind, tuple(self.examples[place] for place in choose_places(len(self.examples), most))
        )


def read_task(file: Path) -> TaskFile:
    """Read a task.

    Raises:
        ExportError: one line `FILE:LINE: what is; what must be`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{file}: cannot be read ({error}); a task is a file in UTF-8 with a JSON object on each line"
        ) from error
    kind: TaskKind | None = None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        values = _parse(line, where)
        kind = kind or _find_kind(values, where)
        examples.append(_read_example(values, kind, where))
    if kind is None or len(examples) < 2:
        raise ExportError(f"{file}: has {len(examples)} examples; a task needs two or more, one JSON object a line")
    if kind == "similarity" and len({cast(Similarity, example).score for example in examples}) < 2:
        raise ExportError(f"{file}: every score is the same; a correlation needs scores that differ")
    return TaskFile(file.stem, kind, tuple(examples))


def read_tasks(files: list[Path]) -> tuple[TaskFile, ...]:
    """Read tasks, whose names must differ.

    Raises:
        ExportError: as `read_task`, or two files have one name.
    """
    tasks = tuple(map(read_task, files))
    names = [task.name for task in tasks]
    if twice := next((file for file, name in zip(files, names, strict=True) if names.count(name) > 1), None):
        raise ExportError(f"{twice}: another task has the name '{twice.stem}' too; give the file another name")
    return tasks


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ExportError(
            f'{where}: is not JSON ({error}); must be an object such as {{"prompt": …, "choices": […], "answer": …}}'
        ) from error
    if not isinstance(values, dict):
        raise ExportError(
            f'{where}: is no JSON object; must be one, such as {{"prompt": …, "choices": […], "answer": …}}'
        )
    return values


def _find_kind(values: dict[str, Any], where: str) -> TaskKind:
    if "texts" in values:
        return "similarity"
    if "choices" in values:
        return "choice"
    if "prompt" in values:
        return "answer"
    keys = ", ".join(values) or "none"
    raise ExportError(
        f"{where}: has the keys {keys}; must have prompt, choices and answer; or prompt and answer; or texts and score"
    )


def _read_example(values: dict[str, Any], kind: TaskKind, where: str) -> Example:
    try:
        return _KINDS[kind].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ExportError(
            f"{where}: {f'{key}: ' if key else ''}{reason}; the file's first line makes it a task of kind {kind}"
        ) from error
