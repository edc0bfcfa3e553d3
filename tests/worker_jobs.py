"""What tests let a stage's process do; the process finds this module by the path that pytest's settings name."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

from upcycle.progress import Progress


def double(number: int, progress: Progress) -> int:
    progress("doubling", number, 2 * number)
    return 2 * number


def take(num_bytes: int, progress: Progress) -> int:
    bytearray(b"\1") * num_bytes
    return os.getpid()


class UnpicklableError(Exception):
    """One that cannot be made of its own arguments."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def fail(kind: str, progress: Progress) -> None:
    if kind == "caused":
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        except OSError as error:
            raise RuntimeError("cannot be written") from error
    if kind == "unpicklable":
        raise UnpicklableError("here", "this")
    os.kill(os.getpid(), signal.SIGKILL)


def wait(marker: str, progress: Progress) -> None:
    Path(marker).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)
