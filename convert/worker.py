"""A process of its own for a stage, which frees its memory.

torch, onnxruntime and the C library keep much of what a stage has freed, so a run in one process holds the most that
any of its stages took. A stage's process is forked from a server that has imported everything and computed nothing: no
thread of torch, no CUDA, no lock of anyone else is in it, and no stage waits for imports. What holds for all of them:

1. Progress, the result, the most memory that was resident, and an error with what caused it come back over a pipe. A
   bug keeps its traceback.
2. The process never sees Ctrl-C, SIGTERM or SIGHUP: the run's own process does, and ends it. It ends itself when that
   one is gone, however that came about, and then it and the server say nothing: nobody waits for it.
3. It holds the lock of the work directory too, so no other run begins while it still writes.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dense2moe.convert.errors import ArtifactError

if TYPE_CHECKING:  # only the type: importing it would load torch
    from dense2moe.upcycle.progress import Progress

_PRELOADED = ["dense2moe.convert.pipeline", "dense2moe.convert.stage_server"]
_TOLD_TO_RUN_ALONE = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

Argument = TypeVar("Argument")
Found = TypeVar("Found")


@dataclass(frozen=True)
class ProcessResult(Generic[Found]):
    """A function's result, and its process's peak resident memory in bytes."""

    found: Found
    peak_resident_bytes: int


@dataclass(frozen=True)
class _Failure:
    """An exception, its causes, and their traceback as text.

    The first cause comes last.
    """

    errors: tuple[BaseException, ...]
    traceback: str


class _WorkerTraceback(Exception):  # noqa: N818 (it is no error of its own: it is where another one was raised)
    """The traceback of the process in which an exception was raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class _Held:
    """An open file for another process to hold too."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _receive, (reduction.DupFd(self.file),)


def _receive(file: Any) -> int:
    return int(file.detach())


def start_server() -> None:
    """Let the server begin its imports, which take seconds.

    A later call does nothing. `run_apart` does it too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD_TO_RUN_ALONE)  # which the server and its processes inherit
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_apart(
    function: Callable[[Argument, Progress], Found], argument: Argument, label: str, held: int, progress: Progress
) -> ProcessResult[Found]:
    """The result of `function(argument)` in a process of its own.

    The argument and the result must be picklable. `held` is a file that is kept open.

    Raises:
        ArtifactError: the process was killed, as the kernel does where memory runs out.
        Exception: whatever the function raises.
    """
    import torch  # this module is imported before it is known that there is work at all

    start_server()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(sender, _Held(held), function, argument, torch.get_num_threads()), daemon=True
    )
    with _main_hidden():
        process.start()
    sender.close()
    try:
        return _listen(receiver, process, label, progress)
    finally:
        process.kill()  # it has nothing left to do, or we have no use for it
        process.join()
        process.close()
        receiver.close()


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Context manager: no main module is seen.

    multiprocessing would run the caller's script again in the new process, and a stage needs nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _listen(
    receiver: multiprocessing.connection.Connection,
    process: multiprocessing.process.BaseProcess,
    label: str,
    progress: Progress,
) -> ProcessResult[Any]:
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            raise ArtifactError(
                f"{label}: its process was ended by {_describe_end(process.exitcode)}; if memory ran out, close other "
                "programs, or "
                "take a smaller model, data.block_size or finetune.batch_size; what is finished is kept; run the same "
                "command to resume"
            ) from None
        match message:
            case ProcessResult():
                return message
            case _Failure():
                raise _link(message)
            case _:
                progress(*message)


def _describe_end(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _work(
    sender: multiprocessing.connection.Connection,
    _: int,
    function: Callable[[Any, Progress], Any],
    argument: Any,
    num_threads: int,
) -> None:
    """What the stage's process does."""
    import torch
    from transformers.utils import logging

    from dense2moe.convert.machine import peak_resident_bytes

    gc.freeze()  # what the server imported stays in the pages that all share
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = function(argument, lambda *said: sender.send(said))
        sender.send(ProcessResult(found, peak_resident_bytes()))
    except BaseException as error:
        with suppress(ConnectionError):  # the run is gone
            sender.send(_Failure(tuple(map(_portable, _causes(error))), traceback.format_exc()))


def _follow_parent() -> None:
    """End this process when its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _portable(error: BaseException) -> BaseException:
    """The exception, or one that describes it if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (it was made a moment ago)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _link(failure: _Failure) -> BaseException:
    """The exception with its causes and its process's traceback."""
    chain = [*failure.errors, _WorkerTraceback(failure.traceback)]
    for error, cause in itertools.pairwise(chain):
        error.__cause__ = cause
    return chain[0]
