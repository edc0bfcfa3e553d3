"""Memory gets into huge pages where Linux gives them, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from export.huge_pages import _large_regions, use_huge_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_only_whole_huge_pages_of_private_anonymous_memory_count() -> None:
    maps = "\n".join([
        "00200000-00600000 rw-p 00000000 00:00 0 ",
        "00a00001-01000fff rw-p 00000000 00:00 0 [heap]",
        "02000000-021fffff rw-p 00000000 00:00 0 ",  # a byte short of one
        "03000000-04000000 r--p 00000000 00:00 0 ",
        "05000000-06000000 rw-p 00000000 08:01 77 /usr/lib/libthing.so",
        "07000000-08000000 rw-p 00000000 00:00 0 [stack]",
    ])  # fmt: skip
    assert list(_large_regions(maps)) == [(0x200000, 0x400000), (0xC00000, 0x400000)]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages() == 0


@pytest.mark.skipif(not _SETTING.is_file() or "[never]" in _SETTING.read_text(), reason="this system gives no huge pages")
def test_memory_in_use_is_in_huge_pages_afterwards_and_holds_what_it_held() -> None:
    held = np.arange(8 << 20, dtype=np.int64)  # 64 MiB
    before = _huge_kilobytes()
    if use_huge_pages() == 0:
        pytest.skip("this kernel cannot collapse pages (Linux before 6.1), or has none left")
    assert _huge_kilobytes() - before >= 32 << 10
    assert np.array_equal(held, np.arange(8 << 20))


def _huge_kilobytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
