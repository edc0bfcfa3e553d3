"""SHA-256 of files, and of values as canonical JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from dense2moe.upcycle.progress import Progress

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
_CHUNK_BYTES = 1 << 20


def digest_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file in 64 hex digits.

    `advance` is told how many bytes were read.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def digest_json(value: Mapping[str, JSON]) -> str:
    """SHA-256 of a value as canonical JSON.

    Keys are sorted, without spaces, in ASCII.
    """
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    ).hexdigest()


def is_digest(value: object) -> bool:
    """Whether it is text of 64 hex digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def count_bytes(what: str, total_bytes: int, progress: Progress | None) -> Callable[[int], None]:
    """A function that takes numbers of bytes, and reports their sum."""
    done_bytes = 0

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        if progress:
            progress(what, done_bytes, total_bytes)

    return advance


def walk_files(directory: Path) -> Iterator[Path]:
    """Every file and link below a directory, sorted.

    Links are not followed.

    Unlike `Path.rglob`, a folder that cannot be listed is an error.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(Path(entry.path))
        else:
            yield Path(entry.path)
