"""Our programs in tests.

In this process, or forked from the server of stages, which has imported all that they need.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.cli import main
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.termination import termination_raised
from dense2moe.convert.worker import ProcessResult, run_apart, start_server
from dense2moe.upcycle.progress import Progress

_PATIENCE = 600  # seconds


def dense2moe(*arguments: object, **settings: Any) -> Result:
    """The command in this process, where a bug keeps its traceback.

    `settings` are those of click's runner, such as `input`.
    """
    return CliRunner().invoke(
        main, [str(each) for each in arguments], prog_name="dense2moe", catch_exceptions=False, **settings
    )


@contextmanager
def stages_here() -> Iterator[None]:
    """For the length of a `with`, stages run in this process.

    What processes of their own are for is shown elsewhere, and they cost more than most stages of tiny models.
    """

    def run_here(function: Callable[..., Any], argument: Any, _: str, __: int, progress: Any) -> ProcessResult[Any]:
        return ProcessResult(function(argument, progress), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.walk.run_apart", run_here)
        patch.setattr("dense2moe.convert.worker.start_server", lambda: None)
        yield


def serve_from_here() -> None:
    """Make the server of stages, for the tests of this process, of what it has imported so far.

    It is forked instead of begun as a program, which would import everything again. For a process that has computed
    nothing yet: no thread and no state of a test may be in it.
    """

    def spawn(program: bytes, arguments: list[str], descriptors: Iterable[int]) -> int:
        if "forkserver" not in arguments[-1]:
            return begin(program, arguments, descriptors)
        if (server := os.fork()) != 0:
            return server
        multiprocessing.forkserver._forkserver._lock = threading.Lock()  # held while a server is begun
        try:
            _let_go(kept=descriptors)
            exec(arguments[-1], {})  # as `python -c` would
        except BaseException as error:
            if not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(0)

    begin = multiprocessing.util.spawnv_passfds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", spawn)
        start_server()


def _let_go(kept: Iterable[int]) -> None:
    """Have no open file of the process that this one was forked from, but what a program would be given.

    Their numbers stay taken: objects of that process still write to them, and close them, as if they were its own.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number not in kept:
            with suppress(OSError):  # that of the folder itself, which is closed
                os.fstat(number)
                os.dup2(nothing, number, inheritable=False)
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )


def fork(
    function: Callable[..., object], *arguments: Any, said: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Begin a function of a module, with picklable arguments, in a process that can be killed.

    What it says goes into the file `said`.
    """
    start_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_do, args=(function, arguments, str(said), dict(environment or {}))
    )
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Kill it, and wait until the server can fork again.

    One that is killed while it asks for a process of its own takes the server down with it.
    """
    process.kill()
    process.join()
    deadline = time.monotonic() + _PATIENCE
    while not _is_up():
        assert time.monotonic() < deadline, "no process can be forked"
        time.sleep(0.1)


def wait(process: BaseProcess) -> int | None:
    """Its exit code, or None where it did not end in time and was killed."""
    process.join(_PATIENCE)
    ended = process.exitcode
    kill(process)
    return ended


def _is_up() -> bool:
    start_server()
    probe = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    try:
        probe.start()
        probe.join(_PATIENCE)
        return probe.exitcode == 0
    except (OSError, EOFError):
        return False


def run_command(arguments: Iterable[str]) -> None:
    """The command, in a process of its own."""
    main(list(arguments), prog_name="dense2moe")


def run_until_killed(arguments: Iterable[str], workdir: Path, stage: str) -> None:
    """The command, which SIGKILL ends at the first word of a stage that has begun to write.

    What it says comes from its own process, if it has one, which is then left alone at its work.
    """
    begin = ProgressDisplay.stage

    def begin_to_listen(display: ProgressDisplay, label: str) -> Progress:
        show = begin(display, label)

        def listen(what: str, done: int, total: int) -> None:
            if label == stage and any(workdir.glob(f"{stage}-*.partial")):  # not while its inputs are checked
                os.kill(os.getpid(), signal.SIGKILL)
            show(what, done, total)

        return listen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "stage", begin_to_listen)
        run_command(arguments)


def run_and_wait(workdir: Path, marker: str) -> None:
    """A run whose stage writes its process's number to a file, and then waits to be ended."""
    with lock(workdir) as held, termination_raised():
        run_apart(_wait, marker, "data", held, lambda *_: None)


def run_in_a_session(workdir: Path, marker: str) -> None:
    """The same as a program does it: with a server of its own, and a session's signals."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # which the server that this was forked from has blocked
    _have_own_server()
    run_and_wait(workdir, marker)


def run_limited(arguments: Iterable[str], most_bytes: int) -> None:
    """The command where no file may grow larger, and with a server of its own, which inherits that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    _have_own_server()
    run_command(arguments)


def _have_own_server() -> None:
    server: Any = multiprocessing.forkserver
    del server._forkserver.ensure_running  # see `_do`
    server.ensure_running = server._forkserver.ensure_running
    serve_from_here()


def _wait(marker: str, progress: Progress) -> None:
    Path(marker).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def launch(
    num_processes: int,
    function: Callable[..., object],
    *arguments: Any,
    said: Path,
    environment: Mapping[str, str] | None = None,
) -> list[int | None]:
    """Let processes of one group do a function, as torchrun would; returns their exit codes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    processes = [
        fork(
            function,
            *arguments,
            said=said,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})},
        )
        for rank in range(num_processes)
    ]
    deadline = time.monotonic() + _PATIENCE
    while {process.exitcode for process in processes} in ({None}, {None, 0}) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:  # as torchrun does where one of them fails
        if process.exitcode is None:
            process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_elastic(num_processes: int, arguments: Iterable[str], said: Path) -> None:
    """The command in as many processes, begun and watched by the agent that is behind torchrun."""
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
    )
    elastic_launch(config, _do)(run_command, (list(arguments),), str(said), {})


def _do(function: Callable[..., object], arguments: tuple[Any, ...], said: str, environment: dict[str, str]) -> None:
    import torch

    gc.freeze()
    with open(said, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    # The server that this process comes from serves it too; another one would have to import everything again.
    server: Any = multiprocessing.forkserver
    server.ensure_running = server._forkserver.ensure_running = lambda: None
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
