"""Columns of a terminal's table: names and numbers stay whole, prose folds.

Nothing is cut at any width. What is wider than the terminal folds in this order, and only as far as it must:

1. prose, and the headings of columns, between words;
2. the same behind `/`, `-`, `_`, `.` and `,`, and at last anywhere;
3. names and numbers likewise, in a terminal that is narrower than they are.

rich folds the widest column first, whatever it holds, and breaks a word wherever the column ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len, chop_cells
from rich.table import Table

_GAP = 3
"""Columns of the terminal between two of a table."""
_LEAST = 8
"""Columns of the terminal that prose keeps as long as names leave them."""
_SEPARATED = re.compile(r"[^/\-_.,]*[/\-_.,]+|[^/\-_.,]+")


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether cells fold, and their alignment."""

    heading: str
    folds: bool = False
    justify: Literal["left", "right"] = "left"


def fit_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int,
    sections: Sequence[int] = (),
) -> Table:
    """A table for a terminal of `width` columns.

    An empty line comes before the rows whose numbers are `sections`.
    """
    widths = share_width(columns, rows, width - _GAP * (len(columns) - 1))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    headings = [fold(column.heading, given) for column, given in zip(columns, widths, strict=True)]
    highest = max(map(len, headings), default=0)
    for column, given, heading in zip(columns, widths, headings, strict=True):
        text = "\n".join([""] * (highest - len(heading)) + heading)  # on the last line, above its cells
        table.add_column(text, justify=column.justify, width=given, no_wrap=True)
    for number, row in enumerate(rows):
        cells = ("\n".join(fold(cell, given)) for cell, given in zip(row, widths, strict=True))
        table.add_row(*cells, end_section=number + 1 in sections)
    return table


def share_width(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column, together `room` at most.

    None is wider than what it holds.
    """
    wanted, whole, least = [], [], []
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        kept, folding = ([], [column.heading, *cells]) if column.folds else (cells, [column.heading])
        longest = max(map(cell_len, kept), default=0)
        wanted.append(max(longest, *map(cell_len, folding)))
        whole.append(max(longest, *(cell_len(word) for text in folding for word in text.split(" "))))
        least.append(max(longest, min(_LEAST, whole[-1])))
    for low, high in ((whole, wanted), (least, whole), ([1] * len(columns), least)):
        if sum(low) <= room:
            return _fill(low, high, room - sum(low))
    return [1] * len(columns)


def _fill(low: Sequence[int], high: Sequence[int], spare: int) -> list[int]:
    """Widths from `low` to `high`, the narrowest widened first."""
    widths = list(low)
    while spare > 0 and (growing := [number for number, width in enumerate(widths) if width < high[number]]):
        widths[min(growing, key=lambda number: widths[number])] += 1
        spare -= 1
    return widths


def fold(text: str, width: int) -> list[str]:
    """Lines of at most `width`, with all of the text.

    Folded between words, else behind a separator, else anywhere.
    """
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        elif cell_len(word) <= width:
            lines.append(word)
        else:
            lines += _break_word(word, width)
    return lines if lines[0] or len(lines) == 1 else lines[1:]


def _break_word(word: str, width: int) -> list[str]:
    lines = [""]
    for part in _SEPARATED.findall(word):
        for piece in chop_cells(part, width) if cell_len(part) > width else [part]:
            if cell_len(lines[-1] + piece) <= width:
                lines[-1] += piece
            else:
                lines.append(piece)
    return lines
