"""Disks that fail: whichever write, sync or rename it is, a run ends in success or in one line.

And the next run succeeds. The run is made in this process, with every call that writes below its work directory
counted, and one of them failing. A disk with an error (EIO) fails once; a full one (ENOSPC) fails from then on.
Libraries in Rust and C++ make calls of their own: those meet a largest size of files instead.

The short form belongs to the suite: a few faults in one work directory, each further on. The long form, `pytest -m
campaign`, tries every call of every stage, and compares what the next run makes with what an unbroken run does."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from programs import dense2moe

from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.worker import ProcessResult

COUNT = "DENSE2MOE_CAMPAIGN"
STAGES = ("source", "data", "upcycle", "finetune", "quantize", "onnx", "parity", "report")
_BY_PATH = ("replace", "rename", "mkdir", "symlink", "truncate")
_BY_FILE = ("write", "pwrite", "fsync", "ftruncate", "posix_fallocate")
Kind = Literal["EIO", "ENOSPC"]


class Disk:
    """A disk below a folder, of which the call of this number fails.

    It counts, and notes what is written anywhere else.
    """

    def __init__(self, folder: Path, fails_at: int | None = None, kind: Kind = "EIO") -> None:
        self.folder, self.fails_at, self.kind = folder, fails_at, kind
        self.count = 0
        self.elsewhere: set[str] = set()
        self.failed: list[str] = []

    def meet(self, call: str, path: object) -> None:
        """Count a call; raise where it is the one that fails."""
        place = Path(os.path.abspath(os.fspath(path)))  # type: ignore[call-overload]
        if not place.is_relative_to(self.folder):
            self.elsewhere.add(str(place))
            return
        self.count += 1
        if self.fails_at is not None and (
            self.count == self.fails_at or (self.kind == "ENOSPC" and self.count > self.fails_at)
        ):
            number = getattr(errno, self.kind)
            self.failed.append(f"{call} {place.relative_to(self.folder)}")
            raise OSError(number, os.strerror(number), *([str(place)] if call == "open" or call in _BY_PATH else []))

    def left_elsewhere(self) -> list[str]:
        """What was written outside the folder and is still there."""
        return sorted(path for path in self.elsewhere if not path.startswith("/dev/") and os.path.lexists(path))


@contextmanager
def watched(disk: Disk) -> Iterator[None]:
    """For the length of a `with`, Python's calls that write meet the disk."""
    plain_open = io.open

    class Raw(io.FileIO):
        def write(self, content: Any) -> int:
            disk.meet("write", self.name)
            return super().write(content)

    def open_(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        **rest: Any,
    ) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return plain_open(file, mode, buffering, encoding, errors, newline, **rest)
        disk.meet("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    def by_path(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(path: Any, *rest: Any, **others: Any) -> Any:
            disk.meet(name, rest[0] if name == "symlink" else path)
            return plain(path, *rest, **others)

        return call

    def by_file(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(file: Any, *rest: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{file}")
            if place.startswith("/"):  # no pipe
                disk.meet(name, place)
            return plain(file, *rest)

        return call

    def copy(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(first: int, second: int, *rest: Any, **others: Any) -> Any:
            disk.meet(name, os.readlink(f"/proc/self/fd/{first if name == 'sendfile' else second}"))
            return plain(first, second, *rest, **others)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        for name in _BY_PATH:
            patch.setattr(os, name, by_path(name))
        for name in _BY_FILE:
            patch.setattr(os, name, by_file(name))
        for name in ("sendfile", "copy_file_range"):
            patch.setattr(os, name, copy(name))
        yield


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """For the length of a `with`, no file may grow beyond a size, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def recipe(dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe, whose stages run in this process."""

    def run_here(function: Any, argument: Any, label: str, held: int, progress: Any) -> ProcessResult[Any]:
        return ProcessResult(function(argument, progress), 0)

    monkeypatch.setattr("dense2moe.convert.walk.run_apart", run_here)
    monkeypatch.setattr("dense2moe.convert.worker.start_server", lambda: None)
    (tmp_path / "inputs").mkdir()
    text = "".join(
        f"In year {n} the {who} of house {n % 7} had {3 * n} doors and a garden.\n%%\n"
        for n in range(300)
        for who in ("owner", "keeper")
    )
    (tmp_path / "inputs" / "text.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "inputs" / "tiny.json"
    fields = {
        "source": str(dense_checkpoint),
        "data": {
            "source": {"kind": "text", "train": [str(tmp_path / "inputs" / "text.txt")], "separator": "%%"},
            "block_size": 32,
            "max_train_tokens": 4096,
            "max_validation_tokens": 1024,
            "max_test_tokens": 1024,
        },
        "upcycle": {"num_experts": 4, "receipt": "layers"},
        "finetune": {
            "steps": 2,
            "eval_steps": 1,
            "warmup_steps": 1,
            "batch_size": 4,
            "control": False,
            "tensorboard": True,
        },
        "quantize": {"block_size": 16, "calibration_tokens": 512},
        "variants": ["int8"],
        "export": {"lowering": "grouped"},
        "parity": {"num_blocks": 2, "decode_steps": 4, "max_perplexity_increase": {"int8": 9.0}},
    }
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def run(recipe: Path, workdir: Path, until: str = "report") -> Any:
    return dense2moe("run", recipe, "--workdir", workdir, "--until", until)


def check_end(finished: Any, what: object) -> None:
    """It ended in success or in one line of ours, besides lines of progress."""
    assert finished.exit_code in (0, 1), (what, finished.output)
    lines = [line for line in finished.stderr.splitlines() if not line.startswith(("✓", "·", "…", "!"))]
    if "parity was broken" in finished.stderr:  # a line for each limit: the run has come to its end
        return
    assert [line.partition(" ")[0] for line in lines] == ["Error:"] * finished.exit_code, (what, lines)


def finish(recipe: Path, workdir: Path, until: str = "report") -> None:
    """The next run succeeds, and all of it is as its manifests say."""
    finished = run(recipe, workdir, until)
    assert finished.exit_code == 0 or "parity was broken" in finished.stderr, finished.stderr
    assert not [path.name for path in workdir.iterdir() if path.suffix in (".partial", ".resume")]
    assert dense2moe("verify", workdir).exit_code == 0


def test_a_disk_that_fails_ends_a_run_in_one_line_and_the_next_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    workdir, failed = tmp_path / "work", []
    for number, fails_at in enumerate((1, 3, 9, 20, 90, 200, 15, 50, 120, 12, 30, 12, 20, 60)):
        disk = Disk(workdir, fails_at, ("EIO", "ENOSPC")[number % 2])  # type: ignore[arg-type]
        with watched(disk):
            finished = run(recipe, workdir)
        failed += disk.failed[:1]
        check_end(finished, disk.failed)
        assert disk.left_elsewhere() == []
        if finished.exit_code:
            assert ("the disk fails" in finished.stderr) == (disk.kind == "EIO"), finished.stderr
            assert ("the disk is full" in finished.stderr) == (disk.kind == "ENOSPC"), finished.stderr
            assert str(workdir) in finished.stderr.splitlines()[-1]
    assert {"source", "upcycle", "finetune"} <= {call.split(" ")[1].partition("-")[0] for call in failed}, failed
    finish(recipe, workdir)


def test_files_that_may_not_grow_end_a_run_in_one_line_whoever_writes_them(recipe: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "work"
    for num_bytes in (100, 3_000, 12_000, 30_000, 60_000, 120_000):
        with largest_file(num_bytes):
            finished = run(recipe, workdir, "onnx")
        check_end(finished, num_bytes)
        if finished.exit_code:
            assert (
                "a file grew past the largest size allowed" in finished.stderr or "the disk fails" in finished.stderr
            ), finished.stderr
    finish(recipe, workdir, "onnx")


def digests(workdir: Path, stage: str) -> dict[str, str]:
    """Of the weights that a stage made."""
    made = open_artifact(next(path for path in workdir.glob(f"{stage}-*") if not path.suffix))
    return {
        name: record["sha256"]
        for name, record in made.manifest["files"].items()
        if name.endswith((".safetensors", ".data"))
    }


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_call_of_a_stage_may_fail(stage: str, kind: Kind, recipe: Path, tmp_path: Path) -> None:
    if COUNT not in os.environ:
        pytest.skip(f"set {COUNT}")
    before, workdir = tmp_path / "before", tmp_path / "work"
    number = STAGES.index(stage)
    if number:
        finish(recipe, before, STAGES[number - 1])
    else:
        before.mkdir()
    shutil.copytree(before, workdir, symlinks=True)  # as the source's files are
    disk = Disk(workdir)
    with watched(disk):
        finished = run(recipe, workdir, stage)
    assert finished.exit_code == 0 or "parity was broken" in finished.stderr, finished.stderr
    unbroken = digests(workdir, stage)
    assert disk.count > 3
    for fails_at in range(1, disk.count + 1):
        shutil.rmtree(workdir)
        shutil.copytree(before, workdir, symlinks=True)
        broken = Disk(workdir, fails_at, kind)
        with watched(broken):
            check_end(run(recipe, workdir, stage), broken.failed)
        assert broken.left_elsewhere() == []
        finish(recipe, workdir, stage)
        assert digests(workdir, stage) == unbroken
