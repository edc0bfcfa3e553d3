"""docs/results/families.md: what tests measured for each family, held against what they measure now.

`DENSE2MOE_WRITE_FAMILIES=1 pytest -n 0 -m every_family tests/test_hosts.py tests/test_families.py` writes the table.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "results" / "families.md"
WRITE = "DENSE2MOE_WRITE_FAMILIES"
COLUMNS = ("tiny model", "class", "target", "float32", "bfloat16")
BITWISE = "bitwise"
_NAMES = 3  # columns that name a line
_START, _END = "<!-- table -->\n", "<!-- end of the table -->"
_SLACK = 10  # between machines; a figure is the rounding of a few products

Line = tuple[str, str, str]
"""A tiny model by its name in the tests' tables, its class, and what it becomes."""


def read_lines() -> dict[Line, dict[str, str]]:
    """The figures of each line of the table, by dtype."""
    table = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in table.splitlines()[2:]]
    return {(row[0], row[1], row[2]): dict(zip(COLUMNS[_NAMES:], row[_NAMES:], strict=True)) for row in cells if row[0]}


def describe(rel: float) -> str:
    """A figure as the table has it."""
    return BITWISE if rel == 0.0 else f"{rel:.0e}"


def check(line: Line, dtype: str, rel: float) -> None:
    """Hold the largest relative difference of a zero router against the page, or write it there.

    Raises:
        AssertionError: the page has not this line, or says less.
    """
    lines = read_lines()
    if os.environ.get(WRITE):
        lines.setdefault(line, dict.fromkeys(COLUMNS[_NAMES:], "—"))[dtype] = describe(rel)
        _write(lines)
        return
    said = lines[line][dtype]
    assert rel <= (0.0 if said == BITWISE else _SLACK * float(said)), f"{line} in {dtype}: {rel:.0e}, and not {said}"


def _write(lines: dict[Line, dict[str, str]]) -> None:
    rows = [COLUMNS, ("---",) * _NAMES + ("--:",) * (len(COLUMNS) - _NAMES)]
    rows += [(*line, *figures.values()) for line, figures in sorted(lines.items())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, _, behind = PAGE.read_text(encoding="utf-8").partition(_START)
    PAGE.write_text(f"{before}{_START}\n{table}\n{_END}{behind.partition(_END)[2]}", encoding="utf-8")
