"""How commands end where the system is unkind.

Signals, a failing disk, no memory, a terminal without letters, foreign state.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Never

import pytest
from click.testing import CliRunner
from programs import dense2moe
from report_facts import make_facts
from rich.console import Console

from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.cli import main
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.upcycle.errors import find_os_error

ROOT = Path(__file__).parent.parent
KEPT = "what is finished is kept; run the same command to resume"


def raise_at_once(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The end of a command that meets this error."""

    def load(_: Path) -> Never:
        raise error

    monkeypatch.setattr("dense2moe.convert.recipe.loading.load_recipe", load)
    return dense2moe("plan", "x.yaml", "--workdir", "work")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]
)
def test_a_signal_ends_a_command_in_one_line_and_its_own_code(
    number: int, code: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have switched it off

    def load(_: Path) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb what is to be done at the end
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("dense2moe.convert.recipe.loading.load_recipe", load)
    try:
        finished = dense2moe("check", "x.yaml")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (finished.exit_code, finished.output) == (code, f"{word}; {KEPT}\n")


def test_a_signal_that_is_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup switches it off."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            "dense2moe.convert.recipe.loading.load_recipe", lambda _: os.kill(os.getpid(), signal.SIGHUP) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            dense2moe("check", "x.yaml")
    finally:
        signal.signal(signal.SIGHUP, before)


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"
MMAP = "unable to mmap 5 bytes from file <a>"
ELSE = "or give another --workdir"
DISK = f"look at the disk, {ELSE}, and run again"
MEMORY = "close other programs, or take a smaller model or less text"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EIO, "Input/output error", "work/b"), f"work/b: the disk fails (Input/output error); {DISK}"),
        (OSError(errno.EIO, "Input/output error"), f"work: the disk fails (Input/output error); {DISK}"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a"),
            "a: is gone; must stay while it is used; put it back, or run again",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            "a: too many files are open; raise the limit (ulimit -n), and run again",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "work/a"),
            "work/a: the name is too long; give a shorter --workdir",
        ),
        (OSError(errno.ELOOP, "Too many levels", "a"), "a: links lead in a circle; remove one of them"),
        (
            OSError(errno.EISDIR, "Is a directory", "work/a"),
            f"work/a: a directory is in the way; must be a file; move it away, {ELSE}",
        ),
        (RuntimeError(RUST), f"work: the disk is full; free some space, {ELSE}"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 47"),
            f"work: the disk fails (a file cannot be written); {DISK}",
        ),
        (RuntimeError("std::bad_alloc"), f"out of memory (std::bad_alloc); {MEMORY}"),
        (MemoryError(), f"out of memory (MemoryError); {MEMORY}"),
        (
            RuntimeError(f"{MMAP}: Cannot allocate memory (12)"),
            f"out of memory ({MMAP}: Cannot allocate memory (12)); {MEMORY}",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_system_refuses_is_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = raise_at_once(error, monkeypatch)
    assert (finished.exit_code, finished.output) == (1, f"Error: {line}\n")


def test_a_bug_keeps_its_traceback_where_it_happened_while_a_missing_file_was_handled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug = AttributeError("bug")
    bug.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "optional.json")
    with pytest.raises(AttributeError):
        raise_at_once(bug, monkeypatch)
    assert find_os_error(bug) is None
    bug.__cause__ = bug.__context__
    assert find_os_error(bug) is bug.__cause__


def test_an_end_of_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """click says 'Aborted!' of it, and nothing else."""
    with pytest.raises(RuntimeError) as caught:
        raise_at_once(EOFError(), monkeypatch)
    assert isinstance(caught.value.__cause__, EOFError)


def write_run(workdir: Path, **fields: object) -> Path:
    workdir.mkdir(exist_ok=True)
    state = {"name": "tiny", "status": "running", "recipe": "x.yaml", "artifacts": {}}
    (workdir / "run.json").write_text(json.dumps(state | fields), encoding="utf-8")
    return workdir


def test_a_run_that_was_killed_is_shown_as_stopped_and_one_that_lives_as_running(tmp_path: Path) -> None:
    work = write_run(tmp_path / "work")
    assert dense2moe("show", work).output == "tiny: stopped (x.yaml)\n"
    with lock(work):
        assert dense2moe("show", work).output == "tiny: running (x.yaml)\n"
    assert dense2moe("show", work).output == "tiny: stopped (x.yaml)\n"


def test_a_look_at_the_lock_keeps_no_run_out(tmp_path: Path) -> None:
    with lock(tmp_path):
        pass
    (tmp_path / ".lock").write_text(str(os.getppid()))  # of a process that lives, as its number may be another's by now
    with (tmp_path / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        released = []

        def release(_: float) -> None:
            released.append(fcntl.flock(looking, fcntl.LOCK_UN))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.sleep", release)
            with lock(tmp_path):
                assert len(released) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        '"x"',
        "null",
        "{}",
        "[" * 100_000,
        "\ud800",
        '{"name": 5, "status": "finished", "recipe": "x", "artifacts": {}}',
        '{"name": "a", "status": "finished", "recipe": "x", "artifacts": []}',
        '{"name": "a", "status": "finished", "recipe": "x", "artifacts": {"report": 5}}',
        '{"name": "a", "status": "finished", "recipe": "x", "artifacts": {"report": "../other"}}',
        '{"name": "a", "status": "finished", "recipe": "x", "artifacts": {"report": "gone"}}',
    ],
    ids=lambda text: text[:70],
)
def test_a_foreign_run_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for arguments in (
        ("show", tmp_path),
        ("verify", tmp_path),
        ("compare", tmp_path, tmp_path),
        ("package", tmp_path, tmp_path / "out"),
    ):
        finished = dense2moe(*arguments)
        lines = finished.stderr.splitlines()
        assert (finished.exit_code, len(lines)) == (1, 1), finished.output
        assert lines[0].startswith(f"Error: {tmp_path}")


def write_report(workdir: Path, facts: dict[str, Any]) -> Path:
    workdir.mkdir()
    with build(workdir, "report", "1" * 64) as draft:
        made = draft.seal(inputs={}, settings={}, facts=facts, versions={}, seed=0)
    return write_run(workdir, status="finished", name=workdir.name, artifacts={"report": made.directory.name})


def test_brackets_and_colons_of_a_recipe_are_shown_as_they_are(tmp_path: Path) -> None:
    first, second = make_facts(), make_facts()
    first["recipe"] = "name: '[/INST]'\nseparator: '[x] :smile:'\n"
    second["recipe"] = "name: other\nseparator: y\n"
    finished = dense2moe("compare", write_report(tmp_path / "[a] :+1:", first), write_report(tmp_path / "b", second))
    assert finished.exit_code == 0, finished.output
    for text in ("[a] :+1:", "[/INST]", "[x] :smile:"):
        assert text in finished.stdout


def test_a_terminal_without_letters_ends_no_command(dense_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        (ROOT / "upcycle" / "checkpoints" / "reader.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    recipe = tmp_path / "größe.json"
    source = {"kind": "text", "train": [str(tmp_path / "text.txt")], "separator": "\n\n"}
    recipe.write_text(
        json.dumps({"source": str(dense_checkpoint), "data": {"source": source, "block_size": 32}}), encoding="utf-8"
    )
    report = write_report(tmp_path / "é", make_facts())
    for arguments in (
        ("plan", recipe),
        ("check", recipe),
        ("show", report),
        ("compare", report, report),
        ("run", "--help"),
        ("--help",),
        ("schema",),
    ):
        finished = CliRunner(charset="ascii").invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert finished.exit_code == 0, finished.output


def test_progress_that_cannot_be_shown_stops_nothing() -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ProgressDisplay(Console(file=Full()), line_seconds=0.0) as display:
        display.stage("data")("reading", 1, 2)
        display.note("careful")
        display.reuse("source")
        display.finish("data")
