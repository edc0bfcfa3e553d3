"""Folders for resuming: forced to disk, sealed by checksums, deleted if damaged.

A long computation keeps what it has finished in folders below one scratch directory. Each is written, then sealed by
`keep`: its files are forced to disk, and a record of their sizes and checksums comes last. Before a computation is
resumed, `discard_damage` throws away every folder that is not as its record says, whoever wrote it, and everything that
has no record. So a computation only ever meets folders that are whole, whenever the power went, and begins again what
is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dense2moe.upcycle.errors import describe_error
from dense2moe.upcycle.progress import Progress

RECORD_NAME = "kept.json"
_CHUNK_BYTES = 1 << 20


def begin(folder: Path) -> None:
    """Make an empty folder in the place of whatever is there.

    Raises:
        OSError: the disk is full or not writable.
    """
    discard(folder)
    make(folder)


def make(folder: Path) -> None:
    """Make a folder and its parents, surviving a power cut.

    Raises:
        OSError: the disk is full or not writable, or a file is in the way.
    """
    if folder.is_dir():
        return
    make(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def keep(folder: Path, facts: Any = None) -> None:
    """Seal a folder, which may be empty, with facts for JSON.

    After that it outlives a power cut, and damage to it is noticed.

    Raises:
        OSError: the disk is full or not writable.
    """
    make(folder)
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path, lambda _: None)]
        for path in _walk(folder)
    }
    content = {"facts": facts, "files": files}
    fresh = folder / f"{RECORD_NAME}.partial"
    fresh.write_text(json.dumps({**content, "checksum": _checksum_json(content)}), encoding="utf-8")
    sync(fresh)
    os.replace(fresh, folder / RECORD_NAME)
    sync(folder)
    sync(folder.parent)


def is_kept(folder: Path) -> bool:
    """Whether a folder was sealed."""
    return (folder / RECORD_NAME).is_file()


def read_facts(folder: Path) -> Any:
    """The facts that a folder was sealed with."""
    return json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))["facts"]


def discard(path: Path) -> None:
    """Delete a folder, record first, or a file or link there.

    A link is not followed.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):
            (path / RECORD_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def discard_damage(scratch: Path, progress: Progress) -> list[str]:
    """Delete everything below `scratch` that is unsealed or damaged.

    Returns a line for each folder of the latter.

    Raises:
        OSError: something cannot be listed or deleted.
    """
    if scratch.is_symlink() or not scratch.is_dir():
        discard(scratch)
        return []
    folders = list(_find_kept(scratch))
    total_bytes, done_bytes = (
        sum(path.stat(follow_symlinks=False).st_size for folder in folders for path in _walk(folder)),
        0,
    )

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        progress("checking what an earlier run kept", done_bytes, total_bytes)

    said = []
    for folder in folders:
        if damage := _find_damage(folder, advance):
            discard(folder)
            said.append(f"{folder}: {damage}; deleted, and made again")
    return said


def _find_kept(folder: Path) -> Iterator[Path]:
    """Sealed folders below a folder; deletes all other files."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False):
            discard(path)
        elif os.path.lexists(path / RECORD_NAME):
            yield path
        else:
            yield from _find_kept(path)


def _find_damage(folder: Path, advance: Callable[[int], None]) -> str | None:
    """How a sealed folder differs from its record, or None."""
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        content = {name: record[name] for name in ("facts", "files")}
        if record["checksum"] != _checksum_json(content):
            return f"{RECORD_NAME} is damaged"
    except OSError as error:
        return f"{RECORD_NAME} cannot be read ({describe_error(error)})"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{RECORD_NAME} is damaged"
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    for name in sorted(found.keys() ^ content["files"].keys()):
        return f"{name!r} is {'extra' if name in found else 'missing'}"
    for name, (size, checksum) in content["files"].items():
        try:
            damaged = (
                found[name].is_symlink()
                or found[name].stat().st_size != size
                or _checksum(found[name], advance) != checksum
            )
        except OSError as error:
            return f"{name!r} cannot be read ({describe_error(error)})"
        if damaged:
            return f"{name!r} is damaged"
    return None


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder but directories and its record."""
    for parent, _, names in os.walk(folder):
        yield from (
            Path(parent) / name for name in sorted(names) if name not in (RECORD_NAME, f"{RECORD_NAME}.partial")
        )


def sync_tree(folder: Path) -> None:
    """Force a folder and everything in it to disk.

    Files first, then the entries of their folders.

    Raises:
        OSError: the disk is full or fails.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def sync(path: Path) -> None:
    """Force a file's contents, or a directory's entries, to disk.

    Raises:
        OSError: the disk is full or fails.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _checksum(path: Path, advance: Callable[[int], None]) -> int:
    """CRC-32 of a file.

    It is to find what a power cut or a bad disk did, not a forgery, and takes a third of SHA-256's time: checkpoints
    with an optimizer's state have gigabytes.
    """
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
            advance(len(chunk))
    return found


def _checksum_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode("ascii"))
