"""Each stage's time, and its peak memory beside the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.table import Table

from dense2moe.convert.report.facts import StageCost
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.numerals import NONE, format_seconds, format_size

COST = "cost"
"""The key of a stage's own cost among its facts."""

_HEADERS = ("Stage", "Time", "Peak memory", "Planned", "Ratio")


def take_costs(facts: Mapping[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Facts of stages without their costs, and the costs, by label."""
    without = {label: {name: value for name, value in found.items() if name != COST} for label, found in facts.items()}
    return without, {label: found[COST] for label, found in facts.items() if COST in found}


def read_costs(found: Mapping[str, Any]) -> dict[str, StageCost]:
    """Costs by label, as `take_costs` finds them, as records."""
    return TypeAdapter(dict[str, StageCost]).validate_python(found)


def cost_grid(costs: Mapping[str, StageCost]) -> Grid:
    """A row for each stage, in order."""
    return Grid(_HEADERS, tuple((label, *_cells(cost)) for label, cost in costs.items()))


def cost_table(costs: Mapping[str, StageCost]) -> Table:
    """The same for the terminal, with the time of all stages below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    grid = cost_grid(costs)
    for number, row in enumerate(grid.rows):
        table.add_row(*row, end_section=number + 1 == len(grid.rows))
    most = max((cost.peak_resident_bytes for cost in costs.values()), default=0)
    table.add_row("all", format_seconds(sum(cost.seconds for cost in costs.values())), format_size(most), "", "")
    return table


def _cells(cost: StageCost) -> tuple[str, ...]:
    planned, peak = cost.planned_bytes, cost.peak_resident_bytes
    times = (format_seconds(cost.seconds), format_size(peak))
    return (*times, format_size(planned), f"{peak / planned:.2f}") if planned else (*times, NONE, NONE)
