"""The command that asks a package for labels, entities, words or vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH, find_package
from dense2moe.convert.cli.terminal import open_console
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.imports import uncollected_imports

if TYPE_CHECKING:
    from dense2moe.export.runtime.prediction import Prediction, Predictor

_TABLES = (".csv", ".jsonl", ".json", ".parquet")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_SHOWN_LABELS = 3
_SHOWN_LETTERS = 60


@click.command(short_help="Say labels, entities or vectors with the model in ARTIFACT.")
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@click.argument("files", metavar="[FILE]...", nargs=-1, type=PATH)
@click.option("--text", "texts", multiple=True, help="Text; - reads standard input. May be given several times.")
@click.option("--column", default="text", show_default=True, help="Column of the text, in tables.")
@click.option("--pair-column", help="Column of a second text, of packages that read pairs.")
@click.option("--variant", help="Variant to use, if ARTIFACT is a work directory [default: its first].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, with every label or the whole vector.")
@click.option("--cuda", is_flag=True, help="Run on CUDA instead of the CPU.")
@end_in_one_line
def predict(
    directory: Path,
    files: tuple[Path, ...],
    texts: tuple[str, ...],
    column: str,
    pair_column: str | None,
    variant: str | None,
    as_json: bool,
    cuda: bool,
) -> None:
    """Labels, entities, masked words or vectors by the model in ARTIFACT.

    ARTIFACT is a package or a work directory. FILE is an image; a table (CSV, JSON lines, Parquet) with a column of
    texts; or a text file, a text on each line. Entities come with the characters that they stand at. Long texts are
    read in strides for entities; elsewhere they are cut, and the output says so.
    """
    images = [file for file in files if file.suffix.lower() in _IMAGES]
    read = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in texts]
    pairs: list[str] = []
    for file in files:
        if file not in images:
            own, others = _read_texts(file, column, pair_column)
            read += own
            pairs += others
    if not read and not images:
        raise click.ClickException("nothing to read; give --text, or files of texts or images")
    if pair_column is not None and texts:
        raise click.ClickException("--text has no second text; put the pairs into a table, or leave --pair-column out")
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.export.runtime.prediction import Predictor

    logging.set_verbosity_error()
    predictor = Predictor(find_package(directory, variant), "cuda" if cuda else "cpu")
    found = _predict(predictor, read, pairs if pair_column else None, images)
    if as_json:
        for prediction in found:
            click.echo(json.dumps(prediction.describe(), ensure_ascii=False))
        return
    _print_table(list(found), predictor.task)


def _predict(
    predictor: Predictor, texts: Sequence[str], pairs: Sequence[str] | None, images: Sequence[Path]
) -> Iterator[Prediction]:
    if texts:
        yield from predictor.read_texts(texts, pairs)
    if images:
        yield from predictor.read_images(images)


def _read_texts(file: Path, column: str, pair_column: str | None) -> tuple[list[str], list[str]]:
    """The texts of a file, and second ones if asked for."""
    if file.suffix.lower() in _TABLES:
        from dense2moe.upcycle.data.rows import read_columns

        found = [read_columns(file, name) for name in (column, pair_column) if name is not None]
        return found[0], found[1] if len(found) > 1 else []
    with one_line_errors(file, "cannot be read", "give a text file in UTF-8, a table, or an image"):
        lines = file.read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UpcycleError(f"{file}: holds no text; must have a text on each line")
    return texts, []


def _print_table(found: Sequence[Prediction], task: str) -> None:
    from rich import box
    from rich.table import Table

    headers: tuple[str, ...]
    if task == "token-classification":
        headers = ("input", "entity", "type", "characters", "probability")
    elif task == "feature-extraction":
        headers = ("input", "vector")
    else:
        headers = ("input", "said", "probability", "then")
    table = Table(*headers, box=box.SIMPLE_HEAD)
    for prediction in found:
        for cells in _cells(prediction):
            table.add_row(*cells)
    console = open_console()
    console.print(table, highlight=False)
    if cut := sum(prediction.is_cut for prediction in found):
        console.print(f"{cut} of {len(found)} texts were longer than the model reads, and were cut.", highlight=False)


def _cells(prediction: Prediction) -> Iterator[tuple[str, ...]]:
    shown = " ".join(prediction.input.split())
    shown = shown if len(shown) <= _SHOWN_LETTERS else f"{shown[: _SHOWN_LETTERS - 1]}…"
    if prediction.vector:
        numbers = ", ".join(f"{value:.4f}" for value in prediction.vector[:_SHOWN_LABELS])
        yield shown, f"[{numbers}, …] of {len(prediction.vector)}"
    elif prediction.value is not None:
        yield shown, f"{prediction.value:.4f}", "", ""
    elif prediction.labels:
        first, *rest = prediction.labels[:_SHOWN_LABELS]
        others = ", ".join(f"{each.label} {each.score:.3f}" for each in rest)
        yield shown, first.label, f"{first.score:.3f}", others
    elif prediction.entities:
        for number, each in enumerate(prediction.entities):
            yield shown if number == 0 else "", each.text, each.label, f"{each.start}-{each.end}", f"{each.score:.3f}"
    else:
        yield shown, "(none)"
