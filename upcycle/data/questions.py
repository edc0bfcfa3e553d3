"""Questions with answers in a context: rows as SQuAD has them.

In tables each question is a row (Rajpurkar et al. 2018, in the shape of the hub's `squad_v2`); SQuAD's own files hold
paragraphs, each with its questions. An answer is a stretch of the context and the place of its first character.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.data.cells import find_cell, read_text
from dense2moe.upcycle.data.config import Columns
from dense2moe.upcycle.data.documents import read_file
from dense2moe.upcycle.errors import UpcycleError, shorten

_TEXT, _START = "text", "answer_start"
_SHAPE = '{"text": ["…"], "answer_start": [0]}, with empty lists where the context has no answer'
_SQUAD = Columns(question="question")
"""The keys of a question in SQuAD's own files."""


@dataclass(frozen=True)
class QuestionRow:
    """A question, its context, and the right answers, if any.

    starts: of each answer the place of its first character.
    """

    where: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def key(self) -> str:
        """What tells it from others: both texts."""
        return f"{self.question}\0{self.context}"

    @property
    def number(self) -> int:
        """Its number among questions, the same wherever it stands; 48 bits."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:6])

    @property
    def answer(self) -> list[list[Any]]:
        """The right answers, each with its place."""
        return [list(pair) for pair in zip(self.answers, self.starts, strict=True)]


def make_question(values: Mapping[str, Any], source: Columns, where: str) -> QuestionRow:
    """A row of a table as a question.

    Raises:
        UpcycleError: a column is missing or has another type, or an answer does not stand at its place.
    """
    assert source.question is not None
    question, context = (read_text(values, name, where) for name in (source.question, source.context))
    answers, starts = _read_answers(find_cell(values, source.answers, where), source.answers, where)
    for answer, start in zip(answers, starts, strict=True):
        if not answer.strip():
            raise UpcycleError(f"{where}: column '{source.answers}' has an empty answer; leave it out, and its start")
        if start < 0 or context[start : start + len(answer)] != answer:
            there = context[max(0, start) : max(0, start) + len(answer)]
            raise UpcycleError(
                f"{where}: answer '{shorten(answer)}' does not stand at character {start} of column "
                f"'{source.context}', where '{shorten(there)}' does; {_tell_place(context, answer)}"
            )
    return QuestionRow(where, question.strip(), context, answers, starts)


def _tell_place(context: str, answer: str) -> str:
    """How to mend an answer that stands elsewhere, or nowhere."""
    found = context.find(answer)
    return "the context does not have it; correct the row" if found < 0 else f"it begins at {found} first"


def _read_answers(given: Any, column: str, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and places, of two lists or a list of pairs."""
    if isinstance(given, str):  # as a cell of CSV
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise UpcycleError(
                f"{where}: column '{column}' is {shorten(repr(given))}; must be JSON: {_SHAPE}"
            ) from None
    if isinstance(given, Sequence) and all(isinstance(each, Mapping) for each in given):
        given = {name: [each.get(name) for each in given] for name in (_TEXT, _START)}
    texts, starts = (given.get(name) if isinstance(given, Mapping) else None for name in (_TEXT, _START))
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    ):
        raise UpcycleError(f"{where}: column '{column}' is {shorten(repr(given))}; must be {_SHAPE}")
    return tuple(texts), tuple(starts)


def read_nested(file: Path) -> Iterator[QuestionRow] | None:
    """The questions of SQuAD's own JSON; None of any other file.

    Raises:
        UpcycleError: the file cannot be read, or a part is missing.
    """
    if file.suffix.lower() != ".json":
        return None
    refuse_pointer(file)
    try:
        found = json.loads("".join(read_file(file)))
    except (ValueError, RecursionError):
        return None  # JSON lines
    articles = found.get("data") if isinstance(found, dict) else None
    return _read_articles(articles, file) if isinstance(articles, list) else None


def _read_articles(articles: Sequence[Any], file: Path) -> Iterator[QuestionRow]:
    for number, article in enumerate(articles):
        place = f"{file}, data[{number}]"
        for inner, paragraph in enumerate(_list_parts(article, "paragraphs", place)):
            own = f"{place}.paragraphs[{inner}]"
            for last, values in enumerate(_list_parts(paragraph, "qas", own)):
                where = f"{own}.qas[{last}]"
                if not isinstance(values, dict):
                    raise UpcycleError(f"{where}: is no object; must be a question with its answers")
                yield make_question({"context": paragraph.get("context"), **values}, _SQUAD, where)


def _list_parts(whole: Any, name: str, where: str) -> list[Any]:
    found = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise UpcycleError(f"{where}: has no list of {name}; must have one, as SQuAD's files do")
    return found
