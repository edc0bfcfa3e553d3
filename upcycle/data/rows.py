"""Labelled rows of tables, CoNLL files and the hub."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.data.cells import check_unicode, find_cell, read_text
from dense2moe.upcycle.data.config import Columns, ConllData, HubSplits, HubTableData, TableData
from dense2moe.upcycle.data.documents import read_file
from dense2moe.upcycle.data.questions import QuestionRow, make_question, read_nested
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten
from dense2moe.upcycle.hub import tell_hub_errors

Label = str | float | tuple[str, ...]
"""The name of a label, those that hold of several, or a number to predict."""

_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
_LARGEST_CELL = 1 << 30  # letters


@dataclass(frozen=True)
class LabelledRow:
    """A text with its label, or with words and tags.

    where: the file and line, or the row, for messages. text: what is tokenized; of words, they with spaces between.
    """

    where: str
    text: str
    label: Label | None = None
    pair: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from others: its texts."""
        return self.text if self.pair is None else f"{self.text}\0{self.pair}"

    @property
    def answer(self) -> Label:
        """Its label, or the tags of its words."""
        if self.words:
            return self.tags
        assert self.label is not None
        return self.label


TableRow = LabelledRow | QuestionRow


def read_table(file: Path, source: TableData) -> Iterator[TableRow]:
    """The rows of a CSV, JSON-lines or Parquet file, or SQuAD's own.

    Raises:
        UpcycleError: the file cannot be read, or a row lacks a column or holds another type; one line.
    """
    if source.question is not None and (nested := read_nested(file)) is not None:
        yield from nested
        return
    yield from (make_row(values, source, where) for where, values in read_rows(file))


def read_columns(file: Path, column: str) -> list[str]:
    """One column of texts of a table.

    Raises:
        UpcycleError: as `read_table`.
    """
    return [read_text(values, column, where) for where, values in read_rows(file)]


def read_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a table, with their places."""
    refuse_pointer(file)
    match file.suffix.lower():
        case ".csv":
            return _read_csv(file)
        case ".jsonl" | ".json":
            return _read_json_lines(file)
        case ".parquet":
            return _read_parquet(file)
        case _:
            raise UpcycleError(f"{file}: a table is {', '.join(_SUFFIXES)}; rename or convert it")


def _read_csv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    lines = io.StringIO("".join(read_file(file)), newline="\n")  # which alone ends a line, of all that Unicode has
    rows = csv.DictReader(lines, strict=True)
    with one_line_errors(file, "is no CSV", "quote texts that hold commas or line ends"), _cells_of_any_size():
        names = rows.fieldnames or ()
        if len(set(names)) < len(names):
            raise UpcycleError(f"{file}:1: names a column twice: {shorten(', '.join(names))}; give each its own name")
        found = [(rows.line_num, values) for values in rows]
    for number, values in found:
        if None in values:
            raise UpcycleError(
                f"{file}:{number}: has more cells than the first line has names; quote texts with commas"
            )
        if any(value is None for value in values.values()):
            raise UpcycleError(
                f"{file}:{number}: has fewer cells than the first line has names; give each column a cell"
            )
        yield f"{file}:{number}", values


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """Context manager: cells of a CSV may be long.

    Python's own limit is 128 kB.
    """
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate("".join(read_file(file)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UpcycleError(f"{file}:{number}: is not JSON ({error}); must be one object a line") from None
        if not isinstance(values, dict):
            raise UpcycleError(f'{file}:{number}: is no JSON object; must be one, such as {{"text": …}}')
        yield f"{file}:{number}", values


def _read_parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as parquet  # slow to import, and only this needs it

    with one_line_errors(file, "is no Parquet file", "write it again"):
        rows = parquet.read_table(file).to_pylist()
    yield from ((f"{file}, row {number}", values) for number, values in enumerate(rows))


def read_conll(file: Path, source: ConllData) -> Iterator[LabelledRow]:
    """The texts of a CoNLL file.

    Raises:
        UpcycleError: the file cannot be read, or a line has too few columns; one line.
    """
    words: list[str] = []
    tags: list[str] = []
    began = 1
    least = max(2, source.word_column + 1, source.tag_column + 1, -source.tag_column)
    for number, line in enumerate(("".join(read_file(file)) + "\n").split("\n"), 1):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            if words:
                yield LabelledRow(f"{file}:{began}", " ".join(words), words=tuple(words), tags=tuple(tags))
            words, tags, began = [], [], number + 1
            continue
        if len(cells) < least:
            raise UpcycleError(
                f"{file}:{number}: has {len(cells)} columns; must have {least}, divided by tabs or spaces, of which "
                f"{source.word_column} is the word and {source.tag_column} the tag"
            )
        word, tag = cells[source.word_column].strip(), cells[source.tag_column].strip()
        if not word or not tag:
            raise UpcycleError(f"{file}:{number}: has an empty {'tag' if word else 'word'}; each line must have both")
        words.append(word)
        tags.append(tag)


def open_hub_table(source: HubSplits, split: str) -> Any:
    """A split of the hub's, as the `datasets` library has it.

    Raises:
        UpcycleError: there is none, or it cannot be fetched; one line.
    """
    import datasets  # slow to import, and only this needs it

    with tell_hub_errors(f"data.source: data set '{source.path}', split '{split}'", "give files of your own"):
        return datasets.load_dataset(source.path, source.name, revision=source.revision, split=split)


def read_hub_rows(rows: Any, source: HubTableData, split: str) -> Iterator[TableRow]:
    """Rows of a data set, with the names of their labels."""
    return (make_row(values, source, where) for where, values in read_hub_values(rows, source, split))


def read_hub_values(rows: Any, source: HubSplits, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a data set with their places, labels by their names."""
    named = dict(rows.features.items())
    for number, values in enumerate(rows):
        spoken = {name: _name_labels(named[name], value) for name, value in values.items()}
        yield f"data set '{source.path}', row {number} of split '{split}'", spoken


def _name_labels(feature: Any, value: Any) -> Any:
    """A value with the names of its classes, if any."""
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value)
    inner: Any = getattr(feature, "feature", None)
    if hasattr(inner, "int2str") and isinstance(value, list):
        return [inner.int2str(each) for each in value]
    return value


def make_row(values: Mapping[str, Any], source: Columns, where: str) -> TableRow:
    """A row of a table as a labelled text or a question.

    Raises:
        UpcycleError: a column is missing, or its value is no text, label or list of them, or no answer.
    """
    if source.question is not None:
        return make_question(values, source, where)
    if source.words is not None:
        words, tags = (_read_list(values, name, where) for name in (source.words, source.tags))
        if len(words) != len(tags):
            raise UpcycleError(
                f"{where}: has {len(words)} {source.words} and {len(tags)} {source.tags}; must be as many"
            )
        if not all(word.strip() for word in words):
            raise UpcycleError(f"{where}: {source.words} has an empty word; leave it out, and its tag")
        if not all(tag.strip() for tag in tags):
            raise UpcycleError(f"{where}: {source.tags} has an empty tag; must be a name, such as O")
        return LabelledRow(where, " ".join(words), words=words, tags=tags)
    text = read_text(values, source.text, where)
    pair = None if source.pair is None else read_text(values, source.pair, where)
    return LabelledRow(where, text, _read_label(values, source, where), pair)


def _read_list(values: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    found = find_cell(values, column, where)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise UpcycleError(f'{where}: column \'{column}\' is no list of texts; must be one, such as ["a", "word"]')
    if not all(isinstance(each, str) for each in found):
        raise UpcycleError(f"{where}: column '{column}' holds what is no text; must be a list of texts")
    for each in found:
        check_unicode(each, column, where)
    return tuple(found)


def _read_label(values: Mapping[str, Any], source: Columns, where: str) -> Label:
    column = source.label
    label = find_cell(values, column, where)
    if source.problem == "value":
        number = _read_number(label)
        if not math.isfinite(number):
            raise UpcycleError(f"{where}: column '{column}' is {shorten(repr(label))}; must be a number to predict")
        return number
    for each in label if isinstance(label, list | tuple) else (label,):
        if isinstance(each, str):
            check_unicode(each, column, where)
    match label:
        case bool():
            return str(label).lower()
        case str() if label.strip():
            return label
        case float() if math.isfinite(label):
            return label
        case int():
            return str(label)
        case list() | tuple() if all(isinstance(each, int | str) and str(each).strip() for each in label):
            return tuple(map(str, label))
        case _:
            raise UpcycleError(
                f"{where}: column '{column}' is {shorten(repr(label))}; must be a label's name, a list of names, or a "
                "number"
            )


def _read_number(value: Any) -> float:
    """The number that a cell holds or spells, else NaN."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
