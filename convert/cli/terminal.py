"""The terminal that tables and prose are printed on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich.console import Console


def open_console() -> Console:
    """Standard output for tables.

    Where it is no terminal, as wide as COLUMNS says, or else 100 columns.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(
        markup=False,  # texts are also the user's: brackets and colons stay as they are
        emoji=False,
        width=None if is_terminal or os.environ.get("COLUMNS") else 100,
        force_terminal=None if is_terminal else False,
    )


def print_prose(console: Console, lines: Iterable[str]) -> None:
    """Print sentences, on a terminal folded between words."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)
