"""What each stage took: time, and peak memory beside the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from dense2moe.convert.report.numerals import NONE, format_seconds, format_size
from dense2moe.convert.report.tables import Grid

COST = "cost"
"""The key of a stage's own cost among its facts."""

_HEADERS = ("Stage", "Time", "Peak memory", "Planned", "Ratio")


@dataclass(frozen=True)
class StageCost:
    """Seconds that a stage took, the most memory of its process that was resident, and what the plan had said.

    Bytes, None where it said nothing. Where several processes share a stage it is the first one's memory; where a stage
    has no process of its own, the run's up to then.
    """

    seconds: float
    peak_resident_bytes: int
    planned_bytes: int | None


def take_costs(facts: Mapping[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The facts of stages without their costs, and the costs; both by label."""
    without = {label: {name: value for name, value in found.items() if name != COST} for label, found in facts.items()}
    return without, {label: found[COST] for label, found in facts.items() if COST in found}


def cost_grid(costs: Mapping[str, dict[str, Any]]) -> Grid:
    """A row for each stage, in order."""
    return Grid(_HEADERS, tuple((label, *_cells(cost)) for label, cost in costs.items()))


def cost_table(costs: Mapping[str, dict[str, Any]]) -> Table:
    """The same for the terminal, with the time of all stages below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    grid = cost_grid(costs)
    for number, row in enumerate(grid.rows):
        table.add_row(*row, end_section=number + 1 == len(grid.rows))
    most = max((cost["peak_resident_bytes"] for cost in costs.values()), default=0)
    table.add_row("all", format_seconds(sum(cost["seconds"] for cost in costs.values())), format_size(most), "", "")
    return table


def _cells(cost: Mapping[str, Any]) -> tuple[str, ...]:
    planned, peak = cost["planned_bytes"], cost["peak_resident_bytes"]
    times = (format_seconds(cost["seconds"]), format_size(peak))
    return (*times, format_size(planned), f"{peak / planned:.2f}") if planned else (*times, NONE, NONE)
