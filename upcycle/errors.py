"""Errors that a user can mend, and other libraries' errors as such."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class MendableError(ValueError):
    """A mistake that the user can mend, told in one line.

    Its text says where, what is, what must be, and how to mend it.

    `exit_code` is what a command that it ends exits with.
    """

    exit_code: ClassVar[int] = 1


class UpcycleError(MendableError):
    """A mistake in what the user gave."""


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad allocation",
    "bad_alloc",
    "Failed to allocate memory",
    "unable to mmap",
)
"""How torch (CUDA's and the CPU's allocator) and onnxruntime say that memory ran out.

None has a type of its own for all of it.
"""
_MOST_LETTERS = 300
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
)
"""What the file system refuses."""
_STATES = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY)
"""What programs also ask for and handle, so that it says nothing where it is only the context of another error."""
_OF_CONTENT = ("is no ", "not a ", "not valid ")
"""How a line begins that says what a file holds, which nobody knows of one that cannot be read."""
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error", "inline_container")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, and no error of ours says so."""
    return isinstance(error, MemoryError) or (
        not isinstance(error, MendableError) and any(words in str(error) for words in _NO_MEMORY)
    )


@contextmanager
def one_line_errors(path: Path, what: str, mend: str, kind: type[MendableError] = UpcycleError) -> Iterator[None]:
    """Context manager: other libraries' errors become one line.

    Only calls of other libraries belong inside. What they raise about the file `path` is one line. The line says the
    path, `what` is wrong with it (that it cannot be read, where the system refused it), the library's own words, and
    how to `mend` it. What stays as it is: see `foreign_errors`.

    Raises:
        MendableError: of this `kind`.
    """

    def tell(error: BaseException) -> MendableError:
        # an OSError without a number is a library's own, such as Pillow's of a file that it does not know
        is_unread = isinstance(error, OSError) and error.errno is not None and what.startswith(_OF_CONTENT)
        return kind(f"{path}: {'cannot be read' if is_unread else what} ({describe_error(error)}); {mend}")

    with foreign_errors(tell):
        yield


@contextmanager
def foreign_errors(tell: Callable[[BaseException], MendableError]) -> Iterator[None]:
    """Context manager: other libraries' errors become what `tell` makes of them.

    Panics of libraries written in Rust are `BaseException`s, and told alike. Refusals of ours, an interrupt, and
    running out of memory stay what they are.
    """
    try:
        yield
    except (MendableError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        raise tell(error) from error


def find_os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception of any library.

    An `OSError`, or one made of its number or words where only these are left.
    Libraries written in Rust quote the number; torch, where it opens the file itself, only says that it cannot write.
    """
    numbers: tuple[int, ...] = (*_REFUSALS, *_STATES)
    torch_cannot_write = False
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return error
        text = str(error)
        for number in numbers:
            if f"(os error {number})" in text:
                return OSError(number, os.strerror(number))
        torch_cannot_write |= isinstance(error, RuntimeError) and any(words in text for words in _TORCH_CANNOT_WRITE)
        if error.__cause__ is None:
            numbers = _REFUSALS
        error = error.__cause__ or error.__context__
    return OSError(errno.EIO, "a file cannot be written") if torch_cannot_write else None


def describe_error(error: BaseException) -> str:
    """Another library's error in a few words of one line.

    What the file system says, or its kind and its own text.
    """
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {shorten(error)}".removesuffix(": ")


def shorten(text: object) -> str:
    """Foreign text cut to one short line without control characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))[
        :_MOST_LETTERS
    ]
