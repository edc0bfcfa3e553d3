"""Progress is seen on a terminal and stays out of the way elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dense2moe.convert.progress import ProgressDisplay, describe_seconds

ROOT = Path(__file__).parent.parent
SCRIPT = """
from dense2moe.convert.progress import ProgressDisplay
with ProgressDisplay() as display:
    display.reuse("source")
    progress = display.stage("upcycle")
    for done in range(3): progress("writing tensors [F32]", done, 3)
    progress("hashing files", 1, 3)
    print("result")
    display.finish("upcycle")
"""
ENVIRONMENT = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm", "COLUMNS": "120"}


def test_without_a_terminal_only_finished_stages_are_told_on_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == "result\n"
    assert re.fullmatch(r"· source  reused\n✓ upcycle  \d+\.\d s\n", done.stderr)


def test_on_a_terminal_bars_are_on_stderr_and_stdout_is_untouched() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert done.stdout == b"result\n"
    assert b"\x1b[" in seen and re.search("✓ upcycle  \\d+\\.\\d s\r\n".encode(), seen)


def terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=True, force_interactive=True, width=120, color_system=None), text


def test_a_bar_shows_stage_work_and_times() -> None:
    console, text = terminal()
    with ProgressDisplay(console) as display:
        progress = display.stage("upcycle")
        progress("writing tensors [F32]", 1, 2)
        display._bars.refresh()
        line = text.getvalue().splitlines()[-1]
        assert re.search(r"upcycle writing tensors \[F32\] ━+.* 1/2 \d\.\d s -:--:--", line)
        display.finish("upcycle")


def test_a_new_phase_starts_its_bar_anew_and_keeps_the_time_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = terminal()
    now = 100.0
    monkeypatch.setattr("dense2moe.convert.progress.time.monotonic", lambda: now)
    with ProgressDisplay(console) as display:
        progress = display.stage("upcycle")
        progress("writing tensors", 2, 2)
        now = 107.0
        progress("hashing files", 0, 2)
        assert not display._bars.tasks[0].finished and display._bars.tasks[0].completed == 0
        display._bars.refresh()
        assert "7.0 s" in text.getvalue().splitlines()[-1]
        now = 112.3
        display.finish("upcycle")
    assert "✓ upcycle  12.3 s\n" in text.getvalue()


def test_an_exception_goes_on_and_its_stage_is_not_called_finished() -> None:
    console, text = terminal()
    with pytest.raises(RuntimeError), ProgressDisplay(console) as display:
        display.stage("upcycle")
        raise RuntimeError
    assert "✓" not in text.getvalue()


def test_a_stage_left_unfinished_is_a_bug() -> None:
    with (
        pytest.raises(AssertionError, match="never finished: upcycle"),
        ProgressDisplay(Console(file=io.StringIO())) as display,
    ):
        display.stage("upcycle")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (11040, "3 h 04 min"),
    ],
)
def test_a_duration_has_the_units_that_matter(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


def test_without_a_terminal_a_running_stage_is_told_of_even_where_it_reports_nothing() -> None:
    text = io.StringIO()
    with ProgressDisplay(Console(file=text, width=120), line_seconds=0.02) as display:
        progress = display.stage("upcycle")
        while "\n" not in text.getvalue():
            time.sleep(0.001)
        progress("writing tensors", 1, 2000)
        said = len(text.getvalue())
        while "2,000" not in text.getvalue()[said:]:
            time.sleep(0.001)
        display.finish("upcycle")
    lines = text.getvalue().splitlines()
    assert re.fullmatch(r"… upcycle  \d\.\d s", lines[0])
    assert re.fullmatch(r"… upcycle  \d\.\d s  writing tensors 1 of 2,000", lines[-2])
    assert re.fullmatch(r"✓ upcycle  \d\.\d s", lines[-1])


def test_a_loss_changes_with_each_step_and_the_bar_goes_on() -> None:
    console, text = terminal()
    with ProgressDisplay(console) as display:
        progress = display.stage("finetune")
        progress("training mixture: loss 3.210", 1, 20)
        started = display._bars.tasks[0].start_time
        progress("training mixture: loss 3.100", 2, 20)
        assert display._bars.tasks[0].start_time == started
        display._bars.refresh()
        assert re.search(r"finetune training mixture: loss 3\.100 ━+.* +2/20 ", text.getvalue().splitlines()[-1])
        display.finish("finetune")
