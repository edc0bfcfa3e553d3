"""The command that asks a package for labels, answers or vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH, find_package
from dense2moe.convert.cli.terminal import open_console
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.imports import uncollected_imports

if TYPE_CHECKING:
    from dense2moe.export.runtime.prediction import Predictor
    from dense2moe.export.runtime.predictions import Prediction

_TABLES = (".csv", ".jsonl", ".json", ".parquet")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_SHOWN_LABELS = 3
_SHOWN_LETTERS = 60


@click.command(short_help="Say labels, answers or vectors with the model in ARTIFACT.")
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@click.argument("files", metavar="[FILE]...", nargs=-1, type=PATH)
@click.option("--text", "texts", multiple=True, help="Text; - reads standard input. May be given several times.")
@click.option("--question", "questions", multiple=True, help="Question; may be given several times.")
@click.option("--context", help="Text that questions are answered from; - reads standard input.")
@click.option("--column", help="Column of the text or question, in tables [default: text, question].")
@click.option("--pair-column", help="Column of a second text, or of the context [default: none, context].")
@click.option("--unanswerable", is_flag=True, help="Give no answer where that is likelier than the best one.")
@click.option("--variant", help="Variant to use, if ARTIFACT is a work directory [default: its first].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, with every label or the whole vector.")
@click.option("--cuda", is_flag=True, help="Run on CUDA instead of the CPU.")
@end_in_one_line
def predict(
    directory: Path,
    files: tuple[Path, ...],
    texts: tuple[str, ...],
    questions: tuple[str, ...],
    context: str | None,
    column: str | None,
    pair_column: str | None,
    unanswerable: bool,
    variant: str | None,
    as_json: bool,
    cuda: bool,
) -> None:
    """Labels, entities, answers, masked words or vectors by the model in ARTIFACT.

    ARTIFACT is a package or a work directory. FILE is an image; a table (CSV, JSON lines, Parquet) with a column of
    texts, or of questions and contexts; or a text file, a text on each line, or the context of --question. Entities
    and answers come with the characters that they stand at. Long texts are read in strides for these; elsewhere they
    are cut, and the output says so.
    """
    given = _Given(files, _read_standard_input(texts), questions, _read_context(context), column, pair_column)
    if not given.files and not given.texts and not questions:
        raise click.ClickException(
            "nothing to read; give --text, or files of texts or images; or --question and --context"
        )
    if pair_column is not None and texts:
        raise click.ClickException("--text has no second text; put the pairs into a table, or leave --pair-column out")
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.export.runtime.prediction import Predictor

    logging.set_verbosity_error()
    predictor = Predictor(find_package(directory, variant), "cuda" if cuda else "cpu")
    if predictor.task == "question-answering":
        found = predictor.read_questions(*given.read_questions(), may_lack=unanswerable)
    else:
        found = given.predict(predictor)
    if as_json:
        for prediction in found:
            click.echo(json.dumps(prediction.describe(), ensure_ascii=False))
        return
    _print_tables(list(found), predictor.tasks)


def _read_standard_input(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(sys.stdin.read().removesuffix("\n") if text == "-" else text for text in texts)


def _read_context(context: str | None) -> str | None:
    return None if context is None else _read_standard_input([context])[0]


@dataclass(frozen=True)
class _Given:
    """What the command was given to read."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]
    questions: tuple[str, ...]
    context: str | None
    column: str | None
    pair_column: str | None

    def predict(self, predictor: Predictor) -> Iterator[Prediction]:
        """Predictions of texts, then of images."""
        if self.questions or self.context is not None:
            raise click.ClickException(f"the package is for {predictor.task}, and answers no questions; give --text")
        images = [file for file in self.files if file.suffix.lower() in _IMAGES]
        read, pairs = list(self.texts), list[str]()
        for file in self.files:
            if file not in images:
                own, others = _read_texts(file, self.column or "text", self.pair_column)
                read += own
                pairs += others
        if read:
            yield from predictor.read_texts(read, pairs if self.pair_column else None)
        if images:
            yield from predictor.read_images(images)

    def read_questions(self) -> tuple[list[str], list[str]]:
        """Questions, and the context of each."""
        if self.texts:
            raise click.ClickException("the package answers questions; give --question and --context, not --text")
        contexts = [] if self.context is None else [self.context]
        found: list[tuple[str, str]] = []
        for file in self.files:
            if file.suffix.lower() in _TABLES:
                own, others = _read_texts(file, self.column or "question", self.pair_column or "context")
                found += zip(own, others, strict=True)
            else:
                contexts.append(_read_whole(file))
        if bool(self.questions) != bool(contexts):
            missing = "a context (--context, or a text file)" if self.questions else "a question (--question)"
            raise click.ClickException(f"lacks {missing}; a question needs the text that it is answered from")
        found += [(question, context) for context in contexts for question in self.questions]
        return [question for question, _ in found], [context for _, context in found]


def _read_whole(file: Path) -> str:
    with one_line_errors(file, "cannot be read", "give a text file in UTF-8, a table, or an image"):
        return file.read_text(encoding="utf-8")


def _read_texts(file: Path, column: str, pair_column: str | None) -> tuple[list[str], list[str]]:
    """The texts of a file, and second ones if asked for."""
    if file.suffix.lower() in _TABLES:
        from dense2moe.upcycle.data.rows import read_columns

        found = [read_columns(file, name) for name in (column, pair_column) if name is not None]
        return found[0], found[1] if len(found) > 1 else []
    texts = [line for line in _read_whole(file).splitlines() if line.strip()]
    if not texts:
        raise UpcycleError(f"{file}: holds no text; must have a text on each line")
    return texts, []


def _print_tables(found: Sequence[Prediction], tasks: Mapping[str, str]) -> None:
    """A table, or one for each of several tasks."""
    from rich import box
    from rich.table import Table

    console = open_console()
    for name, task in tasks.items():
        headers, list_cells = _LAYOUTS.get(task, _LABELS)
        table = Table(*headers, box=box.SIMPLE_HEAD, title=name or None, title_justify="left")
        for prediction in found:
            if name and name not in prediction.tasks:  # words of pairs of texts
                continue
            for number, cells in enumerate(list_cells(prediction.tasks.get(name, prediction))):
                table.add_row(_shorten(prediction.input) if number == 0 else "", *cells)
        console.print(table, highlight=False)
    if cut := sum(prediction.is_cut for prediction in found):
        console.print(f"{cut} of {len(found)} texts were longer than the model reads, and were cut.", highlight=False)


def _shorten(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _SHOWN_LETTERS else f"{shown[: _SHOWN_LETTERS - 1]}…"


def _list_labels(prediction: Prediction) -> Iterator[tuple[str, ...]]:
    if prediction.value is not None:
        yield f"{prediction.value:.4f}", "", ""
    elif prediction.labels:
        first, *rest = prediction.labels[:_SHOWN_LABELS]
        others = ", ".join(f"{each.label} {each.score:.3f}" for each in rest)
        yield first.label, f"{first.score:.3f}", others
    else:
        yield (_NOTHING,)


def _list_entities(prediction: Prediction) -> Iterator[tuple[str, ...]]:
    for each in prediction.entities:
        yield each.text, each.label, f"{each.start}-{each.end}", f"{each.score:.3f}"
    if not prediction.entities:
        yield (_NOTHING,)


def _list_answer(prediction: Prediction) -> Iterator[tuple[str, ...]]:
    if (answer := prediction.answer) is not None:
        place = f"{answer.start}-{answer.end}" if answer.text else ""
        yield answer.text or _NOTHING, place, f"{answer.score:.3f}"


def _list_vector(prediction: Prediction) -> Iterator[tuple[str, ...]]:
    numbers = ", ".join(f"{value:.4f}" for value in prediction.vector[:_SHOWN_LABELS])
    yield (f"[{numbers}, …] of {len(prediction.vector)}",)


Layout = tuple[tuple[str, ...], Callable[["Prediction"], Iterator[tuple[str, ...]]]]
_NOTHING = "(none)"
_LABELS: Layout = (("input", "said", "probability", "then"), _list_labels)
_LAYOUTS: Mapping[str, Layout] = {
    "token-classification": (("input", "entity", "type", "characters", "probability"), _list_entities),
    "question-answering": (("question", "answer", "characters", "probability"), _list_answer),
    "feature-extraction": (("input", "vector"), _list_vector),
}
"""The columns of a task's table, and a prediction's rows without its input; of other tasks those of labels."""
