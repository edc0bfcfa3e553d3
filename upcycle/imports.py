"""Slow imports, done without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Context manager: imports run without the garbage collector.

    The garbage collector waits, and then leaves all that there is alone for good (`gc.freeze`), if anything was
    imported. Modules live to the end of the process. Importing torch and transformers makes so many objects that the
    collector passes over them 900 times meanwhile and twice at exit, which takes longer than importing torch. For
    programs, before their work: whatever garbage there is by then stays.
    """
    num_modules = len(sys.modules)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
