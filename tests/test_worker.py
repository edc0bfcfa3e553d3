"""A stage's process: what comes back over the pipe, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from programs import fork, run_in_a_session
from worker_jobs import double, fail, take

from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.worker import run_apart


@pytest.fixture
def held(tmp_path: Path):
    with lock(tmp_path / "work") as file:
        yield file


def test_what_a_function_returns_and_what_it_says_come_back(held: int) -> None:
    said: list[tuple[object, ...]] = []
    assert run_apart(double, 21, "data", held, lambda *words: said.append(words)).found == 42
    assert said == [("doubling", 21, 42)]


def test_the_memory_that_it_took_is_told_and_free_again(held: int) -> None:
    before = psutil.Process().memory_info().rss
    small, large = (run_apart(take, count, "data", held, lambda *_: None) for count in (1, 500_000_000))
    assert large.found != os.getpid()
    assert 490e6 < large.peak_resident_bytes - small.peak_resident_bytes < 600e6
    assert psutil.Process().memory_info().rss - before < 50e6


def test_an_error_keeps_its_kind_its_cause_and_where_it_was_raised(held: int) -> None:
    with pytest.raises(RuntimeError, match="cannot be written") as caught:
        run_apart(fail, "caused", "data", held, lambda *_: None)
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert (cause.errno, cause.filename) == (errno.ENOSPC, "somewhere")
    assert "in fail" in str(cause.__cause__)


def test_an_error_that_cannot_be_sent_is_told_in_words(held: int) -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: here: this"):
        run_apart(fail, "unpicklable", "data", held, lambda *_: None)


def test_a_process_that_the_kernel_killed_is_one_line(held: int) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"^onnx-int8: its process was ended by SIGKILL; if memory ran out, .*run the same command to resume$",
    ):
        run_apart(fail, "killed", "onnx-int8", held, lambda *_: None)


PARENT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from dense2moe.convert import worker
from programs import run_and_wait
worker._PRELOADED = ["dense2moe.convert.stage_server"]
if __name__ == "__main__":
    run_and_wait(Path({work!r}), {marker!r})
"""
UNIGNORED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, "
    "[sys.executable, sys.argv[1]])"
)


def begin_program(work: Path, marker: Path, errors: Path) -> psutil.Process:
    script, root = marker.with_name("parent.py"), Path(__file__).parent.parent
    fields = {"tests": str(root / "tests"), "root": str(root), "work": str(work), "marker": str(marker)}
    script.write_text(PARENT.format(**fields), encoding="utf-8")
    # whoever began these tests in the background had SIGINT ignored by all below it
    command = [sys.executable, "-c", UNIGNORED, str(script)]
    with errors.open("wb") as said:
        return psutil.Popen(command, stderr=said, start_new_session=True)


def begin_fork(work: Path, marker: Path, errors: Path) -> psutil.Process:
    return psutil.Process(fork(run_in_a_session, work, str(marker), said=errors).pid)


@pytest.mark.parametrize(
    ("how", "begin"),
    [
        (signal.SIGINT, begin_program),
        (signal.SIGINT, begin_fork),
        (signal.SIGKILL, begin_fork),
        (signal.SIGTERM, begin_fork),
    ],
)
def test_when_the_run_ends_its_stage_does_and_then_the_lock_is_free(
    tmp_path: Path, how: signal.Signals, begin: Callable[[Path, Path, Path], psutil.Process]
) -> None:
    """One run is a program, which begins its server as a program; the others are forked, and so are their servers."""
    marker, work, errors = tmp_path / "marker", tmp_path / "work", tmp_path / "said.txt"
    marker.touch()
    parent = begin(work, marker, errors)
    deadline = time.monotonic() + 300
    while not marker.read_text(encoding="utf-8"):
        assert parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE, errors.read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stage = psutil.Process(int(marker.read_text(encoding="utf-8")))
    if how != signal.SIGKILL:
        os.killpg(parent.pid, how)  # as a terminal does, and who ends a service
    else:
        parent.send_signal(how)
    parent.wait()
    with lock(work):
        pass
    stage.wait(10)
    assert not stage.is_running()
    last = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "dense2moe.convert.termination.Terminated"}.get(how, "")
    said = errors.read_text(encoding="utf-8")
    assert said.splitlines()[-1:] == ([last] if last else []), said  # the server and the stage say nothing
    assert said.count("Traceback") == bool(last)


CUT_OFF = """
import multiprocessing.forkserver, os, socket, sys
sys.path.insert(0, {root!r})
from dense2moe.convert import worker
worker._PRELOADED = ["dense2moe.convert.stage_server"]
if __name__ == "__main__":
    worker.start_server()
    server = multiprocessing.forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(server._forkserver_address)
    print(os.waitpid(server._forkserver_pid, 0)[1])
"""


def test_a_server_whose_run_is_killed_while_it_asks_for_a_process_says_nothing(tmp_path: Path) -> None:
    script = tmp_path / "cut_off.py"
    script.write_text(CUT_OFF.format(root=str(Path(__file__).parent.parent)), encoding="utf-8")
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "256\n", "")  # it has ended by an exception
