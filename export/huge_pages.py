"""Huge pages for the weights of this process: less time spent on addresses while decoding waits for memory.

A model's weights are read once a token, in an order that the processor's table of pages of 4 kB is too small for. Linux gives memory in pages of 2 MB
where it is asked for them: by `madvise(MADV_HUGEPAGE)`, and at once, for memory that is in use already, by `MADV_COLLAPSE` (Linux 6.1). Where the
system says "never", or is another one, nothing happens.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h
_HUGE_BYTES = 2 << 20
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?$")


def use_huge_pages() -> int:
    """Put the memory that the process has now into huge pages; returns the bytes for which it was done. Takes about 1 ms a megabyte."""
    if sys.platform != "linux":
        return 0
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = 0
    for start, length in _large_regions(Path("/proc/self/maps").read_text(encoding="utf-8")):
        if library.madvise(start, length, _MADV_HUGEPAGE) == 0 and library.madvise(start, length, _MADV_COLLAPSE) == 0:
            total += length
    return total


def _large_regions(maps: str) -> Iterator[tuple[int, int]]:
    """Start and length of the whole huge pages that fit into each private anonymous region of /proc/PID/maps."""
    for line in maps.splitlines():
        if found := _ANONYMOUS.match(line):
            start, end = (int(text, 16) for text in found.groups())
            first, last = -(-start // _HUGE_BYTES) * _HUGE_BYTES, end // _HUGE_BYTES * _HUGE_BYTES
            if last > first:
                yield first, last - first
