"""Pointers that git leaves in the place of large files."""

from __future__ import annotations

from pathlib import Path

from dense2moe.upcycle.checkpoints.tensors import READ_AGAIN
from dense2moe.upcycle.errors import UpcycleError, one_line_errors

POINTER_REMEDY = "run `git lfs pull` where it was cloned"
_BEGINNING = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Whether a file is a git-LFS pointer instead of the file itself.

    A pointer is a few lines of text that name the file that was not downloaded.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return stream.read(len(_BEGINNING)) == _BEGINNING


def refuse_pointer(file: Path) -> None:
    """Refuse a pointer that git-LFS leaves in the place of a file.

    Raises:
        UpcycleError: it is one, or cannot be read at all.
    """
    with one_line_errors(file, "cannot be read", READ_AGAIN):
        found = is_pointer(file)
    if found:
        raise UpcycleError(f"{file}: is a git-LFS pointer, not the file itself; {POINTER_REMEDY}, or download the file")
