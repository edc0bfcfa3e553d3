"""Imported by the server of stages' processes alone, to silence it.

It says nothing of a run that is gone.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, (EOFError, ConnectionError)):  # as reads and writes end whose other side was killed
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _tell
