"""Keys: one digest of an artifact's inputs, settings and code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from dense2moe.convert.artifact.hashing import JSON, digest_json, walk_files
from dense2moe.convert.artifact.manifest import FORMAT

_SOURCE_SUFFIXES = (".py", ".j2")


def artifact_key(inputs: Mapping[str, str], settings: Mapping[str, JSON], code: str) -> str:
    """The key of an artifact: 64 hex digits.

    From its inputs' keys, its settings, and the digest of its code.
    """
    return digest_json({"dense2moe": FORMAT, "inputs": dict(inputs), "settings": dict(settings), "code": code})


def code_digest(*names: str) -> str:
    """SHA-256 of our version and of the named packages' source files.

    Single modules may be named too.

    The order of the names does not matter.
    """
    sources: dict[str, str] = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name}: not installed"
        if spec.submodule_search_locations is None:
            assert spec.origin is not None, f"{name}: has no source file"
            sources[name] = _digest_source(Path(spec.origin))
        for root in map(Path, spec.submodule_search_locations or ()):
            for path in walk_files(root):
                if path.suffix in _SOURCE_SUFFIXES:
                    sources[f"{name}/{path.relative_to(root).as_posix()}"] = _digest_source(path)
    try:
        version = importlib.metadata.version("dense2moe")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed: the sources say it all
        version = ""
    return digest_json({"version": version, "sources": sources})


def _digest_source(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
