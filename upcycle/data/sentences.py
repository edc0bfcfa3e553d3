"""Texts that belong together, read from tables and encoded for vectors.

A row is a pair with a score, a pair that belongs together, an anchor with its positive and a negative, or a text alone,
which learns the dense model's vector. Splits are made as for labelled rows, by all of a row's texts. Texts are
tokenized one by one, cut at `block_size` tokens, and padded to the longest of the split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.words import EncodedText, encode_text
from dense2moe.upcycle.data.cells import find_cell, read_text
from dense2moe.upcycle.data.config import SentenceColumns
from dense2moe.upcycle.data.encoded import Encoded, pad
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, TYPES
from dense2moe.upcycle.tasks.head import COSINE, RANKING, TEACHER


@dataclass(frozen=True)
class SentenceRow:
    """Texts that belong together, or a pair and its cosine.

    where: the file and line, or the row, for messages.
    """

    where: str
    texts: tuple[str, ...]
    score: float | None = None

    @property
    def key(self) -> str:
        """What tells it from others: its texts."""
        return "\0".join(self.texts)

    @property
    def problem(self) -> str:
        """What its vectors learn."""
        if len(self.texts) == 1:
            return TEACHER
        return RANKING if self.score is None else COSINE

    @property
    def answer(self) -> float | None:
        """The cosine that it should have, if any."""
        return self.score


def read_sentences(rows: Iterable[tuple[str, Mapping[str, Any]]], source: SentenceColumns) -> Iterator[SentenceRow]:
    """The texts of rows, whatever table or data set they are from.

    Raises:
        UpcycleError: a row lacks a column, or holds no text, or a score that is no cosine.
    """
    for where, values in rows:
        texts = tuple(read_text(values, column, where) for column in source.text_columns)
        yield SentenceRow(where, texts, None if source.score is None else _read_score(values, source, where))


def _read_score(values: Mapping[str, Any], source: SentenceColumns, where: str) -> float:
    """A score as the cosine that it stands for."""
    assert source.score is not None
    said = find_cell(values, source.score, where)
    try:
        cosine = float(said) / source.highest_score
    except (TypeError, ValueError, OverflowError):
        cosine = math.nan
    if not -1 <= cosine <= 1:  # NaN neither
        raise UpcycleError(
            f"{where}: column '{source.score}' is {shorten(repr(said))}; must be a number from "
            f"{-source.highest_score:g} to {source.highest_score:g}, which data.source.highest_score says is a cosine "
            "of 1"
        )
    return cosine


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase, most_tokens: int, filling: int, rows: Sequence[SentenceRow]
) -> Encoded:
    """Rows of K texts as tensors [N, K, S].

    `labels` float32 [N] where rows have scores, the numbers of texts, int32 [N, K], of texts that belong together; none
    of texts alone.

    Raises:
        UpcycleError: a text has no tokens.
    """
    texts = [_encode(tokenizer, most_tokens, text, row.where) for row in rows for text in row.texts]
    length, shape = max(len(text.ids) for text in texts), (len(rows), len(rows[0].texts))
    columns = {
        IDS: pad([text.ids for text in texts], length, filling),
        MASK: pad([[1] * len(text.ids) for text in texts], length, 0),
        **({TYPES: pad([text.types for text in texts], length, 0)} if texts[0].types else {}),
    }
    tensors = {name: column.unflatten(0, shape) for name, column in columns.items()}
    if rows[0].problem != TEACHER:
        tensors[LABELS] = _label(rows)
    return Encoded(tensors, int(tensors[MASK].sum()), sum(text.is_cut for text in texts), length)


def _encode(tokenizer: PreTrainedTokenizerBase, most_tokens: int, text: str, where: str) -> EncodedText:
    found = encode_text(tokenizer, text, most_tokens)
    if not found.ids:
        raise UpcycleError(f"{where}: the tokenizer makes no tokens of '{shorten(text)}'; leave the row out")
    return found


def _label(rows: Sequence[SentenceRow]) -> torch.Tensor:
    """Scores, or numbers of texts by which equal ones are known."""
    if rows[0].score is not None:
        return torch.tensor([row.score for row in rows], dtype=torch.float32)
    numbers: dict[str, int] = {}
    return torch.tensor(
        [[numbers.setdefault(text, len(numbers)) for text in row.texts] for row in rows], dtype=torch.int32
    )
