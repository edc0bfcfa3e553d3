"""Two runs side by side: what differs in their recipes, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich import box
from rich.table import Table
from ruamel.yaml import YAML

from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.report.numerals import (
    NONE,
    format_agreement,
    format_perplexity,
    format_rounded,
    format_score,
    format_size,
)
from dense2moe.convert.report.summary import find_measured, summarize
from dense2moe.convert.report.tables import Grid
from dense2moe.convert.report.templates import load_template

_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("perplexity", "perplexity", format_perplexity),
    ("size", "size_bytes", lambda size: NONE if size is None else format_size(size)),
    ("top-1 agreement", "top1_agreement", format_agreement),
    ("routing agreement", "routing_agreement", format_agreement),
    ("decode tokens/s", "decode_tokens_per_second", format_rounded),
    ("prefill tokens/s", "prefill_tokens_per_second", format_rounded),
)
_TEMPLATE_NAME = "comparison.html.j2"


@dataclass(frozen=True)
class Comparison:
    """Names of the two runs; their recipes' differences; a table of figures with ratios, second over first.

    One of verdicts; and what to mind.
    """

    names: tuple[str, str]
    recipes: Grid
    figures: Grid
    parity: Grid
    notes: tuple[str, ...]


def compare_runs(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> Comparison:
    """Set the facts of two reports side by side.

    Where a recipe is valid for this version its defaults count as written, so that a default set in one and left out in
    the other is no difference.
    """
    values = [_flatten(_read_recipe(facts["recipe"])) for facts in (first, second)]
    keys = dict.fromkeys((*values[0], *values[1]))
    differences = tuple(
        (key, *(str(found.get(key, NONE)) for found in values))
        for key in keys
        if values[0].get(key, NONE) != values[1].get(key, NONE)
    )
    return Comparison(
        names,
        Grid(("recipe", *names), differences),
        Grid(("model", "figure", *names, "ratio"), tuple(_figures(first, second))),
        Grid(("variant", *names), tuple(_parity(first, second))),
        tuple(_notes(first, second)),
    )


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """For the terminal: recipes, figures, parity; those without a row are left out."""
    for grid in (comparison.recipes, comparison.figures, comparison.parity):
        if not grid.rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for header, numeric in zip(grid.headers, grid.numeric, strict=True):
            table.add_column(header, justify="right" if numeric else "left", overflow="fold")
        for row, following in zip(grid.rows, (*grid.rows[1:], None), strict=True):
            table.add_row(*row, end_section=grid is comparison.figures and following is not None and following[0] != "")
        yield table


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write the page `output`: one file that needs no other, no script and no network."""
    output.write_text(load_template(_TEMPLATE_NAME).render(comparison=comparison), encoding="utf-8")


def _read_recipe(text: str) -> Any:
    """The recipe as a tree with its defaults.

    Or as it was written where another version of the program reads it otherwise.
    """
    written = YAML(typ="safe", pure=True).load(text)
    try:
        return Recipe.model_validate(written).model_dump(mode="json")
    except ValidationError:
        return written


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves by their dotted names; a list is a leaf, as it is written in one line."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf
        for part, item in value.items()
        for key, leaf in _flatten(item, f"{name}.{part}" if name else str(part)).items()
    }


def _figures(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    sides = [{row.name: row for row in summarize(facts)} for facts in (first, second)]
    scores = [_scores(facts) for facts in (first, second)]
    for model in dict.fromkeys((*sides[0], *sides[1])):
        label = model
        for name, field, text in _FIGURES:
            values = [getattr(row, field) if (row := side.get(model)) else None for side in sides]
            if values == [None, None]:
                continue
            yield label, name, *(text(value) for value in values), _ratio(*values)
            label = ""
        for place in dict.fromkeys(place for side in scores for place in side if place[0] == model):
            values = [side.get(place) for side in scores]
            yield (
                label,
                place[1],
                *(NONE if value is None else format_score(value) for value in values),
                _ratio(*values),
            )


def _scores(facts: dict[str, Any]) -> dict[tuple[str, str], float]:
    """What every package scored, by the model and the name of task and score."""
    found = {f"ONNX {name}": find_measured(variant) or {} for name, variant in facts["variants"].items()}
    tasks = (
        (model, task)
        for model, measured in found.items()
        for task in measured.get("tasks", ())
        if isinstance(task, dict)
    )
    return {(model, f"{task['name']}: {task['metric']}"): task["package"][task["metric"]] for model, task in tasks}


def _ratio(first: float | None, second: float | None) -> str:
    return (
        NONE
        if first is None or second is None or first == 0
        else f"{second / first:.4f} ×"
        if 0.9 < second / first < 1.1
        else f"{second / first:.2f} ×"
    )


def _parity(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for variant in dict.fromkeys((*first["variants"], *second["variants"])):
        yield f"ONNX {variant}", *(_verdict(facts["variants"].get(variant)) for facts in (first, second))


def _verdict(variant: dict[str, Any] | None) -> str:
    if variant is None:
        return NONE
    return (
        "passed"
        if variant["parity"]["passed"]
        else f"FAILED: {'; '.join(variant['parity']['breaches']) or 'no reason given'}"
    )


def _notes(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """What makes figures of the two incomparable."""
    if (
        first["data"].get("digest") != second["data"].get("digest")
        or first["data"]["num_tokens"] != second["data"]["num_tokens"]
    ):
        yield "The held-out text differs, so perplexities and agreements are not to be compared."
    if (
        first["machine"]["processor"] != second["machine"]["processor"]
        or first["machine"]["cores"] != second["machine"]["cores"]
    ):
        machines = [f"{facts['machine']['processor']}, {facts['machine']['cores']} cores" for facts in (first, second)]
        yield f"The machines differ ({machines[0]} and {machines[1]}), so speeds are not to be compared."
    names = [
        name
        for name in {**first["versions"], **second["versions"]}
        if first["versions"].get(name) != second["versions"].get(name)
    ]
    if names:
        told = ", ".join(
            f"{name} {first['versions'].get(name, NONE)} and {second['versions'].get(name, NONE)}" for name in names
        )
        yield f"Versions differ: {told}."
