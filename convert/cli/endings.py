"""How a command ends: one line for mistakes, tracebacks for bugs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from dense2moe.upcycle.errors import MendableError, find_os_error, is_out_of_memory, shorten

_KEPT = "what is finished is kept; run the same command to resume"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Refusal(click.ClickException):
    """One line on stderr, and the error's exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads the instance's


def end_in_one_line(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A command that ends in one line and an exit code.

    The error's own code, or for a signal 128 and its number.

    A bug keeps its traceback.
    """

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from dense2moe.convert.termination import Terminated, termination_raised

        try:
            with termination_raised():
                return function(*args, **kwargs)
        except MendableError as error:
            raise _Refusal(str(error), error.exit_code) from error
        except Terminated as error:
            _end(f"{'terminated' if error.signal == signal.SIGTERM else 'hung up'}; {_KEPT}", error.exit_code)
        except KeyboardInterrupt:
            _end(f"interrupted; {_KEPT}", 128 + signal.SIGINT)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except EOFError as error:  # click would take it for the end of its own input, and say 'Aborted!' alone
            raise RuntimeError("a file or a pipe ended early") from error
        except Exception as error:
            if (line := _describe_system(error, kwargs)) is not None:
                raise _Refusal(line, MendableError.exit_code) from error
            raise

    return wrapped


def _end(line: str, exit_code: int) -> NoReturn:
    with suppress(OSError):  # the terminal may be what is gone
        click.echo(line, err=True)
    sys.exit(exit_code)


def _describe_system(error: Exception, arguments: Mapping[str, Any]) -> str | None:
    """A lack of memory or disk space, in one line.

    Any library may have passed the error on.

    None where it refused nothing.
    """
    from dense2moe.convert.artifact.disk import describe_os_error

    if is_out_of_memory(error):
        return (
            f"out of memory ({shorten(error) or type(error).__name__}); close other programs, or take a smaller "
            "model or less text"
        )
    if (cause := find_os_error(error)) is None:
        return None
    place = next(
        (value for name in ("workdir", "output", "directory") if isinstance(value := arguments.get(name), Path)), None
    )
    return describe_os_error(
        cause,
        place or Path("runs" if "workdir" in arguments else "what is read"),  # the default of --workdir is below it
        "--workdir" if "workdir" in arguments else "OUTPUT" if "output" in arguments else None,
    )
