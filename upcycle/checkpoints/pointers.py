"""Pointers that git leaves in the place of large files."""

from __future__ import annotations

from pathlib import Path

POINTER_REMEDY = "run `git lfs pull` where it was cloned"
_BEGINNING = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Whether a file is a git-LFS pointer, a few lines of text that name the file that was not downloaded.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return stream.read(len(_BEGINNING)) == _BEGINNING
