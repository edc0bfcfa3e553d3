"""Tables for a terminal: names and numbers whole, prose folded, nothing cut."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from dense2moe.convert.report.columns import Column, fit_table, fold, share_width

COLUMNS = (Column("key"), Column("what it is", folds=True), Column("first-run-of-two", justify="right"))
ROWS = (
    ("quantize.max_perplexity_increase", "how much worse the perplexity may be, in per cent", "1.0000 ×"),
    ("seed", "any number", "7"),
)


def print_lines(width: int, columns=COLUMNS, rows=ROWS, **options) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(fit_table(columns, rows, width, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_table_that_fits_folds_nothing() -> None:
    lines = print_lines(120)
    assert [line.split("   ")[0] for line in lines[2:]] == [row[0] for row in ROWS]
    assert all(any(" ".join(row[1].split()) in line for line in lines) for row in ROWS)


@pytest.mark.parametrize("width", [80, 66, 60])
def test_prose_and_headings_fold_and_names_and_numbers_do_not(width: int) -> None:
    lines = print_lines(width)
    assert max(map(len, lines)) <= width
    for whole in ("quantize.max_perplexity_increase", "1.0000 ×"):
        assert any(whole in line for line in lines)
    for word in ROWS[0][1].split():
        assert any(word in line.split() for line in lines)


def test_a_long_name_in_a_heading_folds_behind_its_separators() -> None:
    headings = print_lines(56)[:3]
    assert [line.split()[-1] for line in headings if line.strip()][-2:] != ["first-run-of-two"]
    assert fold("first-run-of-two", 8) == ["first-", "run-of-", "two"]


def test_at_no_width_is_anything_cut() -> None:
    """Whatever the table, all of its letters are there, in their order within a column."""
    draw = random.Random(0)
    for _ in range(200):
        columns = [
            Column("".join(draw.choices("ab-/ ", k=draw.randint(0, 12))).strip(), draw.random() < 0.5)
            for _ in range(draw.randint(1, 4))
        ]
        rows = [["".join(draw.choices("xyz_. ", k=draw.randint(0, 20))).strip() for _ in columns] for _ in range(3)]
        width = draw.randint(4 * len(columns), 60)
        room = width - 3 * (len(columns) - 1)
        widths = share_width(columns, rows, room)
        assert sum(widths) <= room
        for row in rows:
            for cell, given in zip(row, widths, strict=True):
                lines = fold(cell, given)
                assert "".join(lines).replace(" ", "") == cell.replace(" ", "")
                assert max(map(len, lines)) <= given
        lines = print_lines(width, columns, rows)
        assert max(map(len, lines), default=0) <= width
        assert sum(letter in "xyz_." for line in lines for letter in line) == sum(
            letter in "xyz_." for row in rows for cell in row for letter in cell
        )


def test_sections_begin_behind_an_empty_line() -> None:
    lines = print_lines(120, sections=(1,))
    assert not lines[-2].strip()
