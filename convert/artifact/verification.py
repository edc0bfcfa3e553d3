"""A sealed artifact's files against its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dense2moe.convert.artifact.disk import tell_os_errors
from dense2moe.convert.artifact.hashing import count_bytes, digest_file, walk_files
from dense2moe.convert.artifact.known import digest_known
from dense2moe.convert.artifact.manifest import (
    GIVE,
    MANIFEST_NAME,
    REMAKE,
    Artifact,
    find_broken_seal,
    read_artifact,
)
from dense2moe.convert.errors import ArtifactError
from dense2moe.upcycle.progress import Progress


def check_files(artifact: Artifact, progress: Progress | None = None, largest_bytes: int | None = None) -> None:
    """Read an artifact's files, before something is made of them.

    With `largest_bytes`, only files up to that size. The files that links lead to are read only where they were not, or
    were changed since.

    Raises:
        ArtifactError: a file is not as the manifest says; nothing is ever deleted for that.
    """
    files = artifact.manifest["files"]
    names = [name for name, record in files.items() if largest_bytes is None or record["size"] <= largest_bytes]
    advance = count_bytes(
        f"checking files of {artifact.manifest['label']}", sum(files[name]["size"] for name in names), progress
    )

    def digest(path: Path) -> str:
        """The digest of a file; a link's target is known already.

        A link leads to what a user gave; what lies here is ours, and is read.
        """
        return digest_known(path, advance) if path.is_symlink() else digest_file(path, advance)

    for mismatch in find_mismatches(artifact, digest, names):
        raise ArtifactError(f"{artifact.directory}: {mismatch}; {REMAKE}")


def verify(directory: Path, progress: Progress | None = None) -> list[str]:
    """Every difference of files and manifest, a line each.

    The manifest is compared with its own digest, the files with the manifest. Empty when all is well.

    Raises:
        ArtifactError: as `open_artifact`, but for a manifest that was changed, or a folder cannot be listed.
    """
    artifact = read_artifact(directory, GIVE, sealed=False)
    broken = find_broken_seal(artifact.manifest)
    files: dict[str, dict[str, Any]] = artifact.manifest["files"]
    advance = count_bytes("verifying files", sum(record["size"] for record in files.values()), progress)
    with tell_os_errors(directory, option=None):
        names = {path.relative_to(directory).as_posix() for path in walk_files(directory)}
        extra = [
            f"{repr(name)[1:-1]}: extra; not in the manifest" for name in sorted(names - files.keys() - {MANIFEST_NAME})
        ]
        changed = [f"{MANIFEST_NAME}: {broken}"] if broken else []
        return [*changed, *find_mismatches(artifact, lambda path: digest_file(path, advance)), *extra]


def find_mismatches(
    artifact: Artifact, digest: Callable[[Path], str] | None, names: Sequence[str] | None = None
) -> Iterator[str]:
    """A line for each recorded file that differs.

    With `names`, only these files.

    Without `digest`, as far as can be told without reading it.
    """
    files = artifact.manifest["files"]
    for name in files if names is None else names:
        try:
            mismatch = _compare(artifact.directory, name, files[name], digest)
        except OSError as error:
            mismatch = f"cannot be read ({error.strerror})"
        if mismatch:
            yield f"{name}: {mismatch}"


def _compare(directory: Path, name: str, record: dict[str, Any], digest: Callable[[Path], str] | None) -> str | None:
    path, expected_link = directory / name, record.get("link")
    parents = list(PurePosixPath(name).parents)[:-1]
    if not os.path.lexists(path) or any((directory / parent).is_symlink() for parent in parents):
        return "missing"
    link = os.readlink(path) if path.is_symlink() else None
    if link != expected_link:
        return f"{describe_link(link)}; must be {describe_link(expected_link)}"
    if not path.is_file():
        return "not a file" if link is None else f"broken {describe_link(link)}"
    if path.stat().st_size != record["size"]:
        return f"{path.stat().st_size} bytes; must be {record['size']}"
    if digest and (found := digest(path)) != record["sha256"]:
        return f"SHA-256 {found[:12]}...; must be {record['sha256'][:12]}..."
    return None


def describe_link(target: str | None) -> str:
    """A link, or its absence, in words."""
    return "no link" if target is None else f"link to {target!r}"
