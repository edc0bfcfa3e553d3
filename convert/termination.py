"""SIGTERM and SIGHUP end a command cleanly, as an interrupt does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """This signal told the process to end.

    Code that lets an interrupt through lets this through.

    `exit_code` is what shells give such an end.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


@contextmanager
def termination_raised() -> Iterator[None]:
    """Context manager: in the main thread, signals raise `Terminated`.

    The first of these signals raises `Terminated`, and later ones do not disturb what follows.
    A signal that whoever began this process has switched off, as nohup does, stays off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: found for number in _SIGNALS if (found := signal.getsignal(number)) not in (signal.SIG_IGN, None)}

    def end(number: int, _: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
