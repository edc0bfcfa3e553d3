"""Errors of the file system in one line, and free space."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from dense2moe.convert.errors import ArtifactError


def check_space(directory: Path, needed_bytes: int, option: str = "--workdir") -> None:
    """Refuse to begin what cannot end.

    `option` names the directory that another may be given for.

    Raises:
        ArtifactError: the file system that holds the directory, or will hold it, has fewer bytes free.
    """
    with tell_os_errors(directory, option):
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        needed, free = decimal(needed_bytes), decimal(free_bytes)
        raise ArtifactError(
            f"{directory}: {free} free on this disk; {needed} needed; free some space, or give another {option}"
        )


def describe_os_error(error: OSError, directory: Path, option: str | None = "--workdir") -> str:
    """A system error in one line: where, what happened, how to mend.

    Where is the error's own path, or else `directory`.

    By another `option` if need be, where that names the place: another --workdir helps against no file outside of it.
    None where the directory is only read: nothing else can be given in its place.
    """
    place = error.filename if isinstance(error.filename, str) else str(directory)
    is_inside = option is not None and _is_inside(place, directory)
    otherwise = f", or give another {option}" if is_inside else ""
    match error.errno:
        case errno.ENOSPC:
            what, mend = "the disk is full", f"free some space{otherwise}"
        case errno.EDQUOT:
            what, mend = "your disk quota is used up", f"free some space{otherwise}"
        case errno.EFBIG:
            what, mend = (
                "a file grew past the largest size allowed",
                "raise the limit (ulimit -f)" + (f", or give a {option} on another file system" if is_inside else ""),
            )
        case errno.EACCES | errno.EPERM:
            what, mend = (
                f"no permission; must be yours to read{'' if option is None else ' and write'}",
                f"change its owner or mode{otherwise}",
            )
        case errno.EROFS:
            what = "no write permission: the file system is read-only"
            mend = f"give another {option}" if is_inside else "mount it for writing"
        case errno.ENOTDIR | errno.EEXIST:
            what, mend = "a file is in the way; must be a directory", f"move it away{otherwise}"
        case errno.EISDIR:
            what, mend = "a directory is in the way; must be a file", f"move it away{otherwise}"
        case errno.EIO | errno.ENXIO | errno.ENODEV | errno.ESTALE:
            what, mend = (
                f"the disk fails ({error.strerror})",
                f"look at the disk{otherwise}, and run again",
            )
        case errno.ENOENT:
            what, mend = "is gone; must stay while it is used", "put it back, or run again"
        case errno.EMFILE | errno.ENFILE:
            what, mend = "too many files are open", "raise the limit (ulimit -n), and run again"
        case errno.ENAMETOOLONG:
            what, mend = "the name is too long", f"give a shorter {option if is_inside else 'name'}"
        case errno.ELOOP:
            what, mend = "links lead in a circle", "remove one of them"
        case _:
            what, mend = (
                error.strerror or " ".join(str(error).split()) or type(error).__name__,
                f"mend that{otherwise}, and run again",
            )
    return f"{place}: {what}; {mend}"


def _is_inside(place: str, directory: Path) -> bool:
    """Whether a place is in a directory, its draft, or above it."""
    found, own = Path(os.path.abspath(place)), Path(os.path.abspath(directory))
    if own.is_relative_to(found):
        return True
    if not found.is_relative_to(own.parent):
        return False
    first = found.relative_to(own.parent).parts[0]
    return first == own.name or first.startswith((f"{own.name}.", f".{own.name[:100]}-"))


@contextmanager
def tell_os_errors(directory: Path, option: str | None = "--workdir") -> Iterator[None]:
    """Context manager: an error of the system becomes an ArtifactError.

    The ArtifactError is one line; `option` as in `describe_os_error`.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(describe_os_error(error, directory, option)) from error
