"""Unused memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# oneDNN, which multiplies in bfloat16, keeps the code of each product that it has compiled, by its sizes. By default it
# keeps 1,024, most of which are never asked for again where experts have another number of tokens every time: 0.3 GB
# for a model of 135 M. It is read at the first product.
if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # its older name
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

HEAP_BYTES = 192 << 20
"""What may be free in the heap before it is given back, beside what is in use."""


class _Least:
    """Smallest resident memory since the heap was given back, in bytes."""

    bytes = 0


def release_memory() -> None:
    """Free reference cycles, as models of transformers and trainers form.

    And give what the heap has free back to the system.
    The heap keeps blocks of up to 32 MB that are freed (glibc), of which gradients and optimizers leave gigabytes.
    """
    gc.collect()
    _give_back()


def release_growth() -> None:
    """`release_memory`, if the process has grown by `HEAP_BYTES`.

    With all that torch and transformers import, a collection takes half a second.
    """
    if _has_grown():
        release_memory()


@contextmanager
def small_heap(model: nn.Module) -> Iterator[None]:
    """Context manager: free heap is given back between a model's layers.

    Between two layers of a model the heap is given back wherever what is resident has grown by much. How many tokens an
    expert gets, and so how large its tensors are, is another number each time: what one leaves free in the heap does
    not fit the next, and in a step the heap grows to several times what is in use. To give it back takes as long as to
    fill its pages once more.
    """
    # The hook is on a product in each layer: hooks of a layer are not called where its backward pass computes it once
    # more.
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    products = (next((part for part in layer.modules() if isinstance(part, nn.Linear)), layer) for layer in layers)
    handles = [product.register_forward_pre_hook(lambda *_: give_heap_back()) for product in products]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def give_heap_back() -> None:
    """Return free heap to the system after growth by `HEAP_BYTES`.

    Nothing happens on a system that cannot.
    """
    if _find_resident() is not None and _has_grown():
        _give_back()


def _has_grown() -> bool:
    """Whether resident memory grew by `HEAP_BYTES` over its minimum.

    The minimum is since the heap was last given back.

    Or the system does not tell.
    """
    if (resident := _find_resident()) is None:
        return True
    _Least.bytes = min(_Least.bytes, now := resident())
    return now > _Least.bytes + HEAP_BYTES


def _give_back() -> None:
    trim, resident = _find_trim(), _find_resident()
    if trim is not None:
        trim(0)
    if resident is not None:
        _Least.bytes = resident()


@cache
def _find_resident() -> Callable[[], int] | None:
    """A reader of this process's resident bytes, where cheap (Linux)."""
    source, page = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return (lambda: int(source.read_bytes().split()[1]) * page) if source.exists() else None


@cache
def _find_trim() -> Any:
    """`malloc_trim` of the C library, where it has one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows there is no library without a name
        return None
