"""The terminal that tables are printed on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich.console import Console


def open_console() -> Console:
    """Standard output for tables: 100 columns wide where it is no terminal."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(
        markup=False,  # texts are also the user's: brackets and colons stay as they are
        emoji=False,
        width=None if is_terminal else 100,
        force_terminal=None if is_terminal else False,
    )
