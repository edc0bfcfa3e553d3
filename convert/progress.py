"""Progress on the terminal: bars when there is one, nothing otherwise."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

if TYPE_CHECKING:  # only the type: importing it would load torch
    from upcycle.progress import Progress


class ProgressDisplay:
    """A line for each stage: a live bar while it runs, its time once it is finished.

    Without a terminal there are no bars and no control codes, only the lines of finished stages. An exception takes the bars away and adds nothing:
    its text is the caller's to show. Everything goes to the console, by default on stderr; stdout is never touched.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.fields[label]}", markup=False),
            TextColumn("{task.description}", style="dim", markup=False),
            BarColumn(bar_width=20),
            _StageTimeColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # rich would send what others print on stdout to stderr
            disable=not (console.is_terminal and console.is_interactive),
        )
        self._running: dict[str, _Stage] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bars.stop()
        assert error is not None or not self._running, f"never finished: {', '.join(self._running)}"

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
        """Say that a stage was not run, because its artifact is there."""
        self._print(f"· {label}  reused")

    def _print(self, line: str) -> None:
        self._bars.console.print(Text(line), soft_wrap=True)


class _Stage:
    def __init__(self, bars: Bars, label: str) -> None:
        self.started = time.monotonic()
        self.task = bars.add_task("", total=None, label=label, started=self.started)
        self._bars = bars
        self._what = ""

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._what:  # a new phase: the old one's speed says nothing about it
            self._what = what
            self._bars.reset(self.task, description=what)
        self._bars.update(self.task, completed=done, total=total)


class _StageTimeColumn(ProgressColumn):
    """Time since the stage began; rich's own column starts anew with each phase and stops at 100 %."""

    def render(self, task: Task) -> Text:
        return Text(describe_seconds(time.monotonic() - task.fields["started"]), style="progress.elapsed")


def describe_seconds(seconds: float) -> str:
    """A duration in the two units that matter: `12.3 s`, `2 min 05 s`, `3 h 04 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
