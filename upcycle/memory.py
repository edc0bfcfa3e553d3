"""Memory that nobody uses any more, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from itertools import chain
from typing import Any

from torch import nn


def leave_file(model: nn.Module) -> None:
    """Copy every tensor of a model that was loaded, and so let go of its file.

    A tensor that needs no cast is, to transformers, a view of the mapped file, and one is enough to keep every page of it resident.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()


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
