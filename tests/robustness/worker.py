"""A process of its own for commands, watched.

What crashes, hangs or takes all memory there is told, and the next command runs.

    with Watched(folder) as watched:
        answer = watched.run(["check", "recipe.yaml"], directory)

The commands run one after the other in one process, forked from a server that has imported everything. Its home and its
temporary directory are folders of their own below `folder`, so that whatever is written there is seen."""

from __future__ import annotations

import multiprocessing.connection
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import psutil
from click.testing import CliRunner

from dense2moe.convert.cli import main
from tests.programs import fork, kill

_ROOT = Path(__file__).parent.parent.parent
_MOST_BYTES = 6 << 30
"""Of memory that a command may take: the models are tiny."""
_MOST_CASES = 400
"""Commands in one process; the next ones get a new one, so that what libraries keep does not add up."""
_PATIENCE = 10.0
"""Seconds at most for the processes of stages to end behind a command."""


@dataclass(frozen=True)
class Answer:
    """What a command did.

    `said` is what came past Python's own streams, from libraries in C++ and Rust; `traceback` is of an exception that
    the command line let through; `died` says how its process ended where it did; `left` names processes that are there
    still."""

    code: int | None
    output: str = ""
    errors: str = ""
    said: str = ""
    traceback: str = ""
    died: str = ""
    left: tuple[str, ...] = ()


class Watched:
    """The process, begun when it is first needed and again when it died."""

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        self.folder = folder
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        for name in ("home", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, arguments: Sequence[str], directory: Path) -> Answer:
        """Run a command in a directory."""
        return self.call(run_command, list(arguments), directory=directory)

    def call(
        self, function: Callable[..., Answer], *arguments: Any, directory: Path, patience: float | None = None
    ) -> Answer:
        """Call a function of a module there; `run` does it with the command line."""
        self.start()
        assert self._connection is not None
        self._connection.send((function, arguments, str(directory), patience or self._patience))
        answer: Answer = self._connection.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.wait(self._patience)
            self._process = self._connection = None

    def start(self) -> None:
        """Begin the process if it is not there."""
        if self._connection is not None:
            return
        ours, theirs = multiprocessing.connection.Pipe()
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
        }
        own = {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(_ROOT),
        }
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", f"from tests.robustness.worker import watch; watch({theirs.fileno()})"]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=kept | own | threads, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = ours
        self.run(["--version"], self.folder)  # what imports write, such as a list of fonts, is no command's work


# In the process that watches.


def watch(descriptor: int) -> None:
    """Answer what is asked through an inherited connection, until nobody asks any more."""
    connection = Connection(descriptor)
    said = Path(os.environ["TMPDIR"]).parent / "said.txt"
    said.touch()
    process, pipe, num_cases = None, None, 0
    while True:
        try:
            function, arguments, directory, patience = connection.recv()
        except EOFError:
            break
        if process is None or num_cases >= _MOST_CASES:
            if process is not None:
                kill(process)
            pipe, theirs = multiprocessing.connection.Pipe()
            process, num_cases = fork(serve, theirs, said=said), 0
            theirs.close()
            pipe.recv()  # it is ready
        before, start = _descendants(), said.stat().st_size
        pipe.send((function, arguments, directory))
        num_cases += 1
        try:
            answer = pipe.recv() if pipe.poll(patience) else None
        except EOFError:
            process.join()
            answer, process = Answer(None, died=f"ended with code {process.exitcode}"), None
        else:
            if answer is None:
                kill(process)
                answer, process = Answer(None, died=f"still ran after {patience:.0f} s, and was killed"), None
        with said.open("rb") as file:
            file.seek(start)
            answer = Answer(
                **vars(answer)
                | {"said": file.read().decode("utf-8", "replace"), "left": _left(before, min(patience, _PATIENCE))}
            )
        connection.send(answer)
    if process is not None:
        process.kill()
        process.join()


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _left(before: set[psutil.Process], patience: float) -> tuple[str, ...]:
    deadline = time.monotonic() + patience
    while (left := _descendants() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return tuple(sorted(_describe(process) for process in left))


def _describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "?"


# In the process that runs commands.


def serve(connection: Connection) -> None:
    """Run one command after the other."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    connection.send("ready")
    while True:
        try:
            function, arguments, directory = connection.recv()
        except EOFError:
            return
        os.chdir(directory)
        connection.send(function(*arguments))


def run_command(arguments: list[str]) -> Answer:
    """The command line, whatever comes out of it."""
    try:
        result = CliRunner().invoke(main, arguments, prog_name="dense2moe")
    except BaseException:  # a panic of a library in Rust is no Exception, and click lets it through
        return Answer(None, traceback=traceback.format_exc())
    known: Any = result.exception is None or isinstance(result.exception, SystemExit)
    found = (
        ""
        if known
        else "".join(traceback.format_exception(*result.exc_info))
        if result.exc_info
        else repr(result.exception)
    )
    return Answer(result.exit_code, result.stdout, result.stderr, traceback=found)
