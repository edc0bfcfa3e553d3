"""docs/results/families.md: what tests measured for each family, held against what they measure now.

`DENSE2MOE_WRITE_FAMILIES=1 pytest -n 0 -m every_family tests/test_hosts.py tests/test_families.py
tests/test_host_onnx.py` writes the table.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "results" / "families.md"
WRITE = "DENSE2MOE_WRITE_FAMILIES"
NAMES = ("tiny model", "class", "target")
FIGURES = ("float32", "bfloat16", "ONNX float32")
BITWISE, NONE = "bitwise", "—"
_START, _END = "<!-- table -->\n", "<!-- end of the table -->"
_SLACK = 10  # between machines; a figure is the rounding of a few products

Line = tuple[str, str, str]
"""A tiny model by its name in the tests' tables, its class, and what it becomes."""


def read_lines() -> dict[Line, dict[str, str]]:
    """The figures of each line of the table, by dtype."""
    table = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    cells = [[*row, *(NONE,) * (len(NAMES) + len(FIGURES) - len(row))] for row in cells]
    return {(row[0], row[1], row[2]): dict(zip(FIGURES, row[len(NAMES) :], strict=True)) for row in cells}


def check_figure(line: Line, dtype: str, rel: float) -> None:
    """Hold the largest relative difference of a zero router against the page, or write it there.

    Raises:
        AssertionError: the page has not this line, or says less.
    """
    lines = read_lines()
    if os.environ.get(WRITE):
        lines.setdefault(line, dict.fromkeys(FIGURES, NONE))[dtype] = BITWISE if rel == 0.0 else f"{rel:.0e}"
        _write(lines)
        return
    said = lines[line][dtype]
    assert rel <= (0.0 if said == BITWISE else _SLACK * float(said)), f"{line} in {dtype}: {rel:.0e}, and not {said}"


def find_figure(line: Line, figure: str) -> str:
    """What the page says; a dash while it is written."""
    return NONE if os.environ.get(WRITE) else read_lines()[line][figure]


def _write(lines: dict[Line, dict[str, str]]) -> None:
    rows = [(*NAMES, *FIGURES), (*("---",) * len(NAMES), *("--:",) * len(FIGURES))]
    rows += [(*line, *figures.values()) for line, figures in sorted(lines.items())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, _, behind = PAGE.read_text(encoding="utf-8").partition(_START)
    PAGE.write_text(f"{before}{_START}\n{table}\n{_END}{behind.partition(_END)[2]}", encoding="utf-8")
