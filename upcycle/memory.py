"""Memory that nobody uses any more, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any


def release_memory() -> None:
    """Free objects that only hold each other, as models of transformers and trainers do, and give what the heap has free back to the system.

    The heap keeps blocks of up to 32 MB that are freed (glibc), of which gradients and optimizers leave gigabytes.
    """
    gc.collect()
    if (trim := _find_trim()) is not None:
        trim(0)


@cache
def _find_trim() -> Any:
    """`malloc_trim` of the C library, where it has one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows there is no library without a name
        return None
