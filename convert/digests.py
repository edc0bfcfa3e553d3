"""Digests of a released package, in the format of `sha256sum`.

A package that was given away has no manifest: it is no artifact of a run any more. It has a file `SHA256SUMS` instead,
a line for each other file, so that whoever downloads it can check it with `dense2moe verify`, or with `sha256sum
--check SHA256SUMS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from dense2moe.convert.artifact.hashing import digest_file
from dense2moe.convert.errors import ArtifactError
from dense2moe.upcycle.errors import describe_error, one_line_errors, shorten

DIGESTS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_RESTORE = "download the package again"


def write_digests(directory: Path, known: Mapping[str, str]) -> None:
    """Write the digests of all files in a directory.

    A file that is `known` by name is not read.

    Raises:
        OSError: the disk is full or not writable.
    """
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    lines = (f"{known.get(name) or digest_file(directory / name)}  {name}\n" for name in names)
    (directory / DIGESTS_NAME).write_text("".join(lines), encoding="utf-8")


def find_mismatches(directory: Path) -> list[str]:
    """Every file that differs from `SHA256SUMS`, a line each.

    Files that it does not name count too, hidden ones aside. Empty when all is well.

    Raises:
        ArtifactError: `SHA256SUMS` cannot be read.
    """
    digests = _read_digests(directory / DIGESTS_NAME)
    with one_line_errors(directory, "cannot be listed", "give a directory that is yours to read", ArtifactError):
        names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    # others are those of git and the hub
    shown = {name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)}
    extra = [
        f"{shorten(name)}: extra; not in {DIGESTS_NAME}" for name in sorted(shown - digests.keys() - {DIGESTS_NAME})
    ]
    return [*_compare(directory, digests), *extra]


def _read_digests(path: Path) -> dict[str, str]:
    with one_line_errors(path, "cannot be read", _RESTORE, ArtifactError):
        lines = path.read_text(encoding="utf-8").splitlines()
    digests = {}
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if found is None or PurePosixPath(found[2]).is_absolute() or ".." in PurePosixPath(found[2]).parts:
            raise ArtifactError(
                f"{path}:{number}: is {shorten(line)[:80]!r}; must be 64 hex digits, two spaces and the path of a "
                f"file; {_RESTORE}"
            )
        digests[found[2]] = found[1]
    return digests


def _compare(directory: Path, digests: Mapping[str, str]) -> Iterator[str]:
    for name, expected in digests.items():
        path = directory / name
        if not path.is_file():
            yield f"{shorten(name)}: missing"
            continue
        try:
            found = digest_file(path)
        except OSError as error:
            yield f"{shorten(name)}: cannot be read ({describe_error(error)})"
            continue
        if found != expected:
            yield f"{shorten(name)}: SHA-256 {found[:12]}...; must be {expected[:12]}..."
