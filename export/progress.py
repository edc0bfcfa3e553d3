"""The callback by which the stages of this floor report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is in all.

Figures that change with each step follow a colon and a space.
"""
