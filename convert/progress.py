"""Progress on stderr: bars on terminals, elsewhere lines every ten seconds."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

if TYPE_CHECKING:  # only the type: importing it would load torch
    from dense2moe.upcycle.progress import Progress


_LINE_SECONDS = 10.0
_DETAIL = ": "
"""Between what is being done and figures of it that change with each step, as a loss does."""


class ProgressDisplay:
    """A line for each stage: a bar, then its time.

    The bar is live while the stage runs. Without a terminal there are no bars and no control codes: a stage that runs
    is told of in a line every `line_seconds`, whether it reports anything or not, so that a long step is not taken for
    a hang. An exception takes the bars away and adds nothing: its text is the caller's to show. Everything goes to the
    console, by default on stderr; stdout is never touched.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = _LINE_SECONDS) -> None:
        console = console or Console(stderr=True)
        has_bars = console.is_terminal and console.is_interactive
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.fields[label]}", markup=False),
            TextColumn("{task.description}", style="dim", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _StageTimeColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # rich would send what others print on stdout to stderr
            disable=not has_bars,
        )
        self._running: dict[str, _Stage] = {}
        self._line_seconds = line_seconds
        self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._teller = None if has_bars else threading.Thread(target=self._tell, name="progress lines", daemon=True)

    def __enter__(self) -> Self:
        self._bars.start()
        if self._teller is not None:
            self._teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
        self._bars.stop()
        assert error is not None or not self._running, f"never finished: {', '.join(self._running)}"

    def _tell(self) -> None:
        """Say from time to time what is running, until the display ends."""
        while not self._ended.wait(max(0.0, self._last_line + self._line_seconds - time.monotonic())):
            for stage in list(self._running.values()):
                if time.monotonic() - self._last_line >= self._line_seconds:
                    self._print(stage.describe())
            if not self._running:
                self._last_line = time.monotonic()

    def stage(self, label: str) -> Progress:
        """Begin a stage; the function returned moves its bar."""
        assert label not in self._running, f"{label}: begun twice"
        self._running[label] = _Stage(self._bars, label)
        return self._running[label].show

    def finish(self, label: str) -> None:
        """End a stage: its bar becomes a line with its time."""
        stage = self._running.pop(label)
        self._bars.remove_task(stage.task)
        self._bars.refresh()  # else rich draws the old bar once more below the line
        self._print(f"✓ {label}  {describe_seconds(time.monotonic() - stage.started)}")

    def reuse(self, label: str) -> None:
        """Say that a stage's artifact exists and is reused."""
        self._print(f"· {label}  reused")

    def note(self, line: str) -> None:
        """Show a note that stops nothing."""
        self._print(f"! {line}")

    def _print(self, line: str) -> None:
        with self._lock:
            self._last_line = time.monotonic()
            with suppress(OSError):  # a terminal that is gone, or a full disk behind stderr, stops no run
                self._bars.console.print(Text(line), soft_wrap=True)


class _Stage:
    def __init__(self, bars: Bars, label: str) -> None:
        self.started = time.monotonic()
        self.task = bars.add_task("", total=None, label=label, started=self.started)
        self._bars = bars
        self._label, self._what = label, ""
        self._state: tuple[str, int, int] | None = None

    def show(self, what: str, done: int, total: int) -> None:
        self._state = what, done, total
        phase = what.partition(_DETAIL)[0]
        if phase != self._what:  # a new phase: the old one's speed says nothing about it
            self._what = phase
            self._bars.reset(self.task)
        self._bars.update(self.task, completed=done, total=total, description=what)

    def describe(self) -> str:
        """What the stage does now, in a line."""
        elapsed = f"… {self._label}  {describe_seconds(time.monotonic() - self.started)}"
        return elapsed if self._state is None else "{}  {} {:,} of {:,}".format(elapsed, *self._state)


class _StageTimeColumn(ProgressColumn):
    """Time since the stage began.

    rich's own column starts anew with each phase and stops at 100 %.
    """

    def render(self, task: Task) -> Text:
        return Text(describe_seconds(time.monotonic() - task.fields["started"]), style="progress.elapsed")


def describe_seconds(seconds: float) -> str:
    """A duration in two units: `12.3 s`, `2 min 05 s`.

    From one hour on: `3 h 04 min`.
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
