"""A work directory held by one process alone."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dense2moe.convert.artifact.disk import tell_os_errors
from dense2moe.convert.errors import ArtifactError

LOCK_NAME = ".lock"
_PATIENCE_SECONDS, _MOMENT_SECONDS = 10.0, 0.05


@contextmanager
def lock(workdir: Path) -> Iterator[int]:
    """Make the work directory if missing, and lock it for this process.

    The kernel lets go when the process dies, however it dies. Yields the open file: a process that is given it holds
    the directory as well, until both have died. Where the one that is named in the file is dead, its last process is
    given a while; another one a moment, since `is_locked` holds the lock as long as it looks.

    Raises:
        ArtifactError: another run holds it, or it is not a directory that we can write.
    """
    with tell_os_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with tell_os_errors(workdir):
            began = time.monotonic()
            while not _try_lock(file):
                process = os.pread(file, 20, 0).decode("ascii", "replace")
                is_dead = process.isdigit() and not psutil.pid_exists(int(process))
                if time.monotonic() < began + (_PATIENCE_SECONDS if is_dead else 2 * _MOMENT_SECONDS):
                    time.sleep(_MOMENT_SECONDS)
                    continue
                holder = f"another run (process {process})" if process.isdigit() else "another run"
                raise ArtifactError(
                    f"{workdir}: {holder} is using this work directory; wait for it to end, or give another --workdir"
                )
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        yield file
    finally:
        os.close(file)


def is_locked(workdir: Path) -> bool:
    """Whether a process holds the lock of a work directory.

    Raises:
        ArtifactError: the lock cannot be read.
    """
    with tell_os_errors(workdir):
        try:
            file = os.open(workdir / LOCK_NAME, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(file, fcntl.LOCK_SH)
        finally:
            os.close(file)


def _try_lock(file: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
