"""Errors of the file system in one line, and free space."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from dense2moe.convert.errors import ArtifactError


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        ArtifactError: the file system that holds the directory, or will hold it, has fewer bytes free.
    """
    with tell_os_errors(directory):
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        needed, free = decimal(needed_bytes), decimal(free_bytes)
        raise ArtifactError(
            f"{directory}: {free} free on this disk; {needed} needed; free some space, or give another --workdir"
        )


def describe_os_error(error: OSError, directory: Path, option: str = "--workdir") -> str:
    """A system error in one line: where, what happened, how to mend.

    Where is the error's own path, or else `directory`.

    By another `option` if need be.
    """
    match error.errno:
        case errno.ENOSPC:
            what, mend = "the disk is full", f"free some space, or give another {option}"
        case errno.EDQUOT:
            what, mend = "your disk quota is used up", f"free some space, or give another {option}"
        case errno.EFBIG:
            what, mend = (
                "a file grew past the largest size allowed",
                f"raise the limit (ulimit -f), or give a {option} on another file system",
            )
        case errno.EACCES | errno.EPERM:
            what, mend = (
                "no permission; must be yours to read and write",
                f"change its owner or mode, or give another {option}",
            )
        case errno.EROFS:
            what, mend = "no write permission: the file system is read-only", f"give another {option}"
        case errno.ENOTDIR | errno.EEXIST:
            what, mend = "a file is in the way; must be a directory", f"move it away, or give another {option}"
        case errno.EISDIR:
            what, mend = "a directory is in the way; must be a file", f"move it away, or give another {option}"
        case errno.EIO | errno.ENXIO | errno.ENODEV | errno.ESTALE:
            what, mend = (
                f"the disk fails ({error.strerror})",
                f"look at the disk, or give another {option}, and run again",
            )
        case errno.ENOENT:
            what, mend = "is gone; must stay while it is used", "put it back, or run again"
        case errno.EMFILE | errno.ENFILE:
            what, mend = "too many files are open", "raise the limit (ulimit -n), and run again"
        case errno.ENAMETOOLONG:
            what, mend = "the name is too long", f"give a shorter {option}"
        case errno.ELOOP:
            what, mend = "links lead in a circle", "remove one of them"
        case _:
            what, mend = (
                error.strerror or " ".join(str(error).split()) or type(error).__name__,
                f"mend that, or give another {option}, and run again",
            )
    return f"{error.filename if isinstance(error.filename, str) else directory}: {what}; {mend}"


@contextmanager
def tell_os_errors(directory: Path) -> Iterator[None]:
    """Context manager: an error of the system becomes an ArtifactError.

    The ArtifactError is one line.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(describe_os_error(error, directory)) from error
