"""New directories, which get their names when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dense2moe.upcycle.errors import UpcycleError, one_line_errors


@contextmanager
def new_directory(output: str | Path) -> Iterator[Path]:
    """A directory that gets its name when it is complete.

    A failure leaves nothing behind.

    Raises:
        UpcycleError: something is there already, or no directory can be made there.
    """
    output = Path(output)
    partial = output.with_name(f"{output.name}.partial")
    with one_line_errors(output, "no directory can be made there", "give another one"):
        taken = output.exists() and not (output.is_dir() and not any(output.iterdir()))
        if not taken:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    if taken:
        raise UpcycleError(f"{output}: exists already; must be a new directory; give another one, or delete it")
    try:
        yield partial
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
