"""Two runs side by side: differing settings, figures, parity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table
from ruamel.yaml import YAML

from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.report.columns import Column, fit_table
from dense2moe.convert.report.facts import ReportFacts, VariantFacts
from dense2moe.convert.report.figures import format_figure
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.numerals import NONE, format_agreement, format_rounded, format_score, format_size
from dense2moe.convert.report.summary import FAILED, PASSED, Row, summarize
from dense2moe.convert.report.templates import load_template
from dense2moe.export.parity.records import TaskCheck

_FIGURES: tuple[tuple[str, Callable[[Row], float | None], Callable[[Any], str]], ...] = (
    ("size", lambda row: row.size_bytes, lambda size: NONE if size is None else format_size(size)),
    ("top-1 agreement", lambda row: row.top1_agreement, format_agreement),
    ("routing agreement", lambda row: row.routing_agreement, format_agreement),
    ("decode tokens/s", lambda row: row.decode_tokens_per_second, format_rounded),
    ("prefill tokens/s", lambda row: row.prefill_tokens_per_second, format_rounded),
)
_TEMPLATE_NAME = "comparison.html.j2"


@dataclass(frozen=True)
class RunComparison:
    """Two runs: their names, and tables of recipes, figures and parity.

    A ratio of figures is the second over the first.

    One of verdicts; and what to mind.
    """

    names: tuple[str, str]
    recipes: Grid
    figures: Grid
    parity: Grid
    notes: tuple[str, ...]


def compare_runs(first: ReportFacts, second: ReportFacts, names: tuple[str, str]) -> RunComparison:
    """Set the facts of two reports side by side.

    Where a recipe is valid for this version its defaults count as written, so that a default set in one and left out in
    the other is no difference.
    """
    values = [_flatten(_read_recipe(facts.recipe)) for facts in (first, second)]
    keys = dict.fromkeys((*values[0], *values[1]))
    differences = tuple(
        (key, *(str(found.get(key, NONE)) for found in values))
        for key in keys
        if values[0].get(key, NONE) != values[1].get(key, NONE)
    )
    return RunComparison(
        names,
        Grid(("recipe", *names), differences),
        Grid(("model", "figure", *names, "ratio"), tuple(_figures(first, second))),
        Grid(("variant", *names), tuple(_parity(first, second))),
        tuple(_notes(first, second)),
    )


def comparison_tables(comparison: RunComparison, width: int) -> Iterator[Table]:
    """Tables of recipes, figures and parity, for a terminal's width.

    Keys, models and figures stay whole; what a recipe sets, and why parity failed, folds.
    """
    for grid in (comparison.recipes, comparison.figures, comparison.parity):
        if not grid.rows:
            continue
        columns = [
            Column(header, folds=number > 0 and grid is not comparison.figures, justify="right" if numeric else "left")
            for number, (header, numeric) in enumerate(zip(grid.headers, grid.numeric, strict=True))
        ]
        sections = [number for number, row in enumerate(grid.rows) if number and row[0]]
        yield fit_table(columns, grid.rows, width, sections=sections if grid is comparison.figures else ())


def write_comparison(comparison: RunComparison, output: Path) -> None:
    """Write the page `output`, one file without scripts or network."""
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
    """Leaves by their dotted names; a list is a leaf."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf
        for part, item in value.items()
        for key, leaf in _flatten(item, f"{name}.{part}" if name else str(part)).items()
    }


def _figures(first: ReportFacts, second: ReportFacts) -> Iterator[tuple[str, ...]]:
    sides = [{row.name: row for row in summarize(facts)} for facts in (first, second)]
    scores = [_scores(facts) for facts in (first, second)]
    for model in dict.fromkeys((*sides[0], *sides[1])):
        rows = [side.get(model) for side in sides]
        found = [*_judged(rows), *_measured(rows)]
        for place in dict.fromkeys(place for side in scores for place in side if place[0] == model):
            values = [side.get(place) for side in scores]
            texts = tuple(NONE if value is None else format_score(value) for value in values)
            found.append((place[1], *texts, _ratio(*values)))
        yield from ((model if number == 0 else "", *cells) for number, cells in enumerate(found))


def _judged(rows: Sequence[Row | None]) -> Iterator[tuple[str, ...]]:
    """The figure that models are judged by; a row for each name."""
    figures = [row.figure if row else None for row in rows]
    for name in dict.fromkeys(figure.name for figure in figures if figure):
        same = [figure if figure and figure.name == name else None for figure in figures]
        yield name, *map(format_figure, same), _ratio(*(figure.value if figure else None for figure in same))


def _measured(rows: Sequence[Row | None]) -> Iterator[tuple[str, ...]]:
    for name, read, text in _FIGURES:
        values = [read(row) if row else None for row in rows]
        if values != [None, None]:
            yield name, *map(text, values), _ratio(*values)


def _scores(facts: ReportFacts) -> dict[tuple[str, str], float]:
    """Scores of every package, by model and by task and metric."""
    return {
        (f"ONNX {name}", f"{task.name}: {task.metric}"): task.package[task.metric]
        for name, variant in facts.variants.items()
        if (measured := variant.parity.measured)
        for task in measured.tasks
        if isinstance(task, TaskCheck)
    }


def _ratio(first: float | None, second: float | None) -> str:
    return (
        NONE
        if first is None or second is None or first == 0
        else f"{second / first:.4f} ×"
        if 0.9 < second / first < 1.1
        else f"{second / first:.2f} ×"
    )


def _parity(first: ReportFacts, second: ReportFacts) -> Iterator[tuple[str, ...]]:
    for variant in dict.fromkeys((*first.variants, *second.variants)):
        yield f"ONNX {variant}", *(_verdict(facts.variants.get(variant)) for facts in (first, second))


def _verdict(variant: VariantFacts | None) -> str:
    if variant is None:
        return NONE
    parity = variant.parity
    return PASSED if parity.passed else f"{FAILED}: {'; '.join(parity.breaches) or 'no reason given'}"


def _notes(first: ReportFacts, second: ReportFacts) -> Iterator[str]:
    """What makes figures of the two incomparable."""
    if _text(first) != _text(second):
        figures = dict.fromkeys(facts.figure("dense").name for facts in (first, second))
        yield f"The held-out text differs, so {' and '.join(figures)} and agreements are not to be compared."
    machines = [f"{facts.machine.processor}, {facts.machine.cores} cores" for facts in (first, second)]
    if machines[0] != machines[1]:
        yield f"The machines differ ({machines[0]} and {machines[1]}), so speeds are not to be compared."
    versions = first.versions, second.versions
    differing = [name for name in versions[0] | versions[1] if versions[0].get(name) != versions[1].get(name)]
    if differing:
        told = ", ".join(
            f"{name} {versions[0].get(name, NONE)} and {versions[1].get(name, NONE)}" for name in differing
        )
        yield f"Versions differ: {told}."


def _text(facts: ReportFacts) -> tuple[Any, ...]:
    """What tells one text from another: digests and numbers of tokens."""
    details = {name: value for name, value in facts.data.details.items() if name.startswith("digest")}
    return facts.data.digest, details, facts.data.num_tokens
