"""What a command must not do, for the tests of the process that watches."""

from __future__ import annotations

import os
import time

from tests.robustness.worker import Answer


def crash() -> Answer:
    """End the process by a signal."""
    os.abort()


def hang() -> Answer:
    """Never come back."""
    time.sleep(600)
    return Answer(0)


def leave() -> Answer:
    """Leave a process behind."""
    os.posix_spawnp("sleep", ["sleep", "60"], os.environ)
    return Answer(0)
