"""The manifest of a sealed artifact, and how it is read.

The manifest holds a digest of itself, which every reading checks: facts that were edited are noticed, and so are files,
through their digests, before a stage reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dense2moe.convert.artifact.disk import tell_os_errors
from dense2moe.convert.artifact.hashing import digest_json, is_digest
from dense2moe.convert.errors import ArtifactError
from dense2moe.upcycle.numbers import name_special

FORMAT = 2
"""Version of the manifest's layout; part of every key, so a new layout never meets an old directory."""
MANIFEST_NAME = "manifest.json"
SEAL = "sha256"
"""The manifest's digest of all else in it."""
_FIELDS = {
    "label": str,
    "key": str,
    "inputs": dict,
    "settings": dict,
    "facts": dict,
    "versions": dict,
    "seed": int,
    "files": dict,
    "created": str,
    SEAL: str,
}
REMAKE = "move the directory away, and it will be made again"
GIVE = "give an artifact, a work directory, or a package with SHA256SUMS"


@dataclass(frozen=True)
class Artifact:
    """A sealed directory and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """The key, 64 hex digits."""
        return str(self.manifest["key"])

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that its stage returned."""
        facts: dict[str, Any] = _restore_specials(self.manifest["facts"])
        return facts


def open_artifact(directory: Path) -> Artifact:
    """The artifact in any directory.

    Its place and its name do not matter.

    Raises:
        ArtifactError: there is none, or its manifest is malformed, was changed or names a path outside the directory.
    """
    return read_artifact(directory, GIVE)


def read_artifact(directory: Path, mend: str, sealed: bool = True) -> Artifact:
    """The artifact in a directory.

    `sealed`: its manifest must be as it was written.
    """
    path = directory / MANIFEST_NAME
    with tell_os_errors(directory, option=None):
        if not directory.is_dir():
            raise ArtifactError(
                f"{directory}: {'not a' if os.path.lexists(directory) else 'no such'} directory; {mend}"
            )
        if not path.is_file():
            raise ArtifactError(f"{directory}: no {MANIFEST_NAME}, so not a sealed artifact; {mend}")
        text = path.read_bytes()
    try:
        manifest = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error}); {mend}") from error
    fault = find_fault(manifest)
    if fault:
        raise ArtifactError(f"{path}: {fault}; {mend}")
    if sealed and (broken := find_broken_seal(manifest)):
        raise ArtifactError(f"{path}: {broken}; {REMAKE}")
    return Artifact(directory, manifest)


def mark_specials(value: Any) -> Any:
    """Facts as strict JSON.

    NaN and infinities are objects of one key, {"float": "NaN"}, so that no text of a user's can be taken for one.
    """
    match value:
        case Mapping():
            return {key: mark_specials(item) for key, item in value.items()}
        case list() | tuple():
            return [mark_specials(item) for item in value]
        case float() if name := name_special(value):
            return {"float": name}
        case _:
            return value


def _restore_specials(value: Any) -> Any:
    """The facts that `mark_specials` was given."""
    match value:
        case {"float": ("NaN" | "Infinity" | "-Infinity") as name} if len(value) == 1:
            return float(name)
        case Mapping():
            return {key: _restore_specials(item) for key, item in value.items()}
        case list():
            return [_restore_specials(item) for item in value]
        case _:
            return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def find_fault(manifest: object) -> str | None:
    """What is wrong with a manifest's layout or paths.

    A path may not leave the directory or spoil a line of text.
    """
    if not isinstance(manifest, dict):
        return f"is a {type(manifest).__name__}; must be an object"
    if (layout := manifest.get("dense2moe")) != FORMAT:
        by = (
            "; made by another version of dense2moe, and made anew by a run with this one"
            if isinstance(layout, int)
            else ""
        )
        return f"'dense2moe' is {layout!r:.40}; must be {FORMAT}{by}"
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            return f"'{field}' is {manifest.get(field)!r:.40}; must be of type {kind.__name__}"
    for field in ("key", SEAL):
        if not is_digest(manifest[field]):
            return f"'{field}' is {manifest[field]!r:.80}; must be 64 hex digits"
    for name, record in manifest["files"].items():
        path = PurePosixPath(name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or str(path) != name
            or name in (".", MANIFEST_NAME)
            or not name.isprintable()
        ):
            return f"path {name!r:.80} in 'files'; must be a plain path inside the artifact"
        if not isinstance(record, dict) or not isinstance(record.get("size"), int) or record["size"] < 0:
            return f"'files' has {record!r:.80} for {name}; must be an object with a size in bytes"
        if not is_digest(record.get("sha256")) or not isinstance(record.get("link", ""), str):
            return f"'files' has {record!r:.80} for {name}; must have 64 hex digits as sha256, and text as link if any"
    return None


def find_broken_seal(manifest: Mapping[str, Any]) -> str | None:
    """How a manifest's content differs from what was sealed, in words."""
    found, sealed = digest_manifest(manifest), manifest[SEAL]
    return (
        None
        if found == sealed
        else f"was changed after it was sealed: SHA-256 of its content {found[:12]}...; must be {sealed[:12]}..."
    )


def digest_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without this digest, as it is read."""
    return digest_json(
        json.loads(json.dumps({name: value for name, value in manifest.items() if name != SEAL}, allow_nan=False))
    )
