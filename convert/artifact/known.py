"""Digests of files that were hashed before, kept in the user's cache.

A source of gigabytes is read once, and known again by its path, size, inode and times. An entry that does not fit the
file is nothing, and the file is read anew. So an edit is always noticed: it changes the time of the last change of the
inode, which no program can set back; of a file that was changed within two seconds, whose next edit could fall into
the same tick of a coarse clock, nothing is kept (as git does, Documentation/technical/racy-git.txt); and a file is
forced to disk before it is read, since a page that a program has mapped and changed gets no new time until then.
Where the cache cannot be written, every look reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dense2moe.convert.artifact.hashing import digest_file, is_digest
from dense2moe.upcycle.durable import sync

CACHE_VARIABLE = "DENSE2MOE_CACHE"
"""The environment variable that names another directory for what is kept than the user's cache."""
_LEAST_BYTES = 1_000_000  # a smaller file is read in a moment
_RACY_NS = 2_000_000_000


def digest_known(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, which is read only if new or changed.

    The digest has 64 hex digits. `advance` is told how many bytes were read or known.

    Raises:
        OSError: it cannot be read.
    """
    state = _read_state(path)
    if state["size"] < _LEAST_BYTES:
        return digest_file(path, advance)
    entry = _find_entry(state["path"])
    if entry is not None and (known := _read_entry(entry, state)) is not None:
        advance(state["size"])
        return known
    began = time.time_ns()
    is_forced = _force(path)
    state = _read_state(path)
    digest = digest_file(path, advance)
    is_settled = max(state["mtime_ns"], state["ctime_ns"]) < began - _RACY_NS
    if entry is not None and is_forced and is_settled and _read_state(path) == state:
        _write_entry(entry, {**state, "sha256": digest})
    return digest


def _force(path: Path) -> bool:
    """Write a file's changes to disk; False where the system refuses."""
    try:
        sync(path)
    except OSError:
        return False
    return True


def find_claimed(path: Path) -> str | None:
    """SHA-256 in a cached hub file's name, for large files.

    The hub names their blobs by it. Nothing is read: whoever makes something of the file reads it first.
    """
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and is_digest(blob.name) else None


def _read_state(path: Path) -> dict[str, Any]:
    """The state that tells whether a file has changed."""
    found = path.stat()
    return {
        "path": str(path.resolve()),
        "size": found.st_size,
        "inode": found.st_ino,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _find_entry(path: str) -> Path | None:
    """Where a file's digest is kept; None without a home directory."""
    if named := os.environ.get(CACHE_VARIABLE):
        folder = Path(named)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not folder.is_absolute():  # which the XDG base directory specification, 0.8, has programs ignore
            try:
                folder = Path.home() / ".cache"
            except RuntimeError:
                return None
        folder /= "dense2moe"
    return folder / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _read_entry(entry: Path, state: dict[str, Any]) -> str | None:
    try:
        kept = json.loads(entry.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    digest = kept.pop("sha256", None) if isinstance(kept, dict) else None
    return str(digest) if kept == state and is_digest(digest) else None


def _write_entry(entry: Path, content: dict[str, Any]) -> None:
    """Write an entry whole or not at all.

    Of several runs at once, the last wins.
    """
    fresh = entry.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(fresh, entry)
        finally:
            fresh.unlink(missing_ok=True)
