"""An artifact being made: written, sealed, renamed once.

A work directory holds one directory an artifact, `<label>-<first 12 hex digits of its key>`. While a stage writes, the
name ends in `.partial`; sealing records every file in `manifest.json`, forces everything to disk and renames once. So a
directory without `.partial` is whole, whenever the power went, and another setting, input or version of the code is
another key and another directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dense2moe.convert.artifact.disk import tell_os_errors
from dense2moe.convert.artifact.hashing import JSON, count_bytes, digest_file, is_digest, walk_files
from dense2moe.convert.artifact.known import digest_known
from dense2moe.convert.artifact.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REMAKE,
    SEAL,
    Artifact,
    digest_manifest,
    find_fault,
    mark_specials,
    read_artifact,
)
from dense2moe.convert.artifact.verification import describe_link, find_mismatches
from dense2moe.convert.errors import ArtifactError
from dense2moe.upcycle.durable import sync
from dense2moe.upcycle.progress import Progress

_LEFTOVER = re.compile(r"(?P<label>[A-Za-z0-9][A-Za-z0-9._-]*)-[0-9a-f]{12}\.(?P<kind>partial|resume)")


@dataclass
class Draft:
    """An artifact being made: write into `directory`, then call `seal`."""

    directory: Path
    final: Path
    label: str
    key: str
    artifact: Artifact | None = None

    def seal(
        self,
        *,
        inputs: Mapping[str, str],
        settings: Mapping[str, JSON],
        facts: Mapping[str, JSON],
        versions: Mapping[str, str],
        seed: int,
        progress: Progress | None = None,
    ) -> Artifact:
        """Record every file, and give the directory its final name.

        Each file is hashed and forced to disk first. Modes are as the umask says.

        Raises:
            ArtifactError: the disk is full, or a link leads nowhere.
            ValueError: a setting is NaN or infinite, or anything else that JSON does not have. Facts may be NaN or
                infinite: what a stage measures on a broken model is a finding, and comes back from `Artifact.facts` as
                the same number.
        """
        assert self.artifact is None, f"{self.final}: sealed twice"
        assert not (self.directory / MANIFEST_NAME).exists(), (
            f"{self.directory}: a stage wrote {MANIFEST_NAME}, the name of the manifest"
        )
        manifest: dict[str, Any] = {
            "dense2moe": FORMAT,
            "label": self.label,
            "key": self.key,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": dict(inputs),
            "settings": dict(settings),
            "facts": mark_specials(dict(facts)),
            "versions": dict(versions),
            "seed": seed,
        }
        with tell_os_errors(self.directory):
            _open_modes(self.directory)
            manifest["files"] = _record_files(self.directory, progress)
            manifest[SEAL] = digest_manifest(manifest)
            fault = find_fault(manifest)
            assert not fault, fault
            text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
            (self.directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
            sync(self.directory / MANIFEST_NAME)
            for parent, _, _ in os.walk(self.directory):
                sync(Path(parent))
            os.rename(self.directory, self.final)
            sync(self.final.parent)
        self.artifact = Artifact(self.final, json.loads(text))
        return self.artifact


def find(workdir: Path, label: str, key: str) -> Artifact | None:
    """The sealed artifact of this key, or None.

    Files are checked by size, which costs nothing; `check_files` and `verify` also read them.

    Raises:
        ArtifactError: something else has the artifact's name, its manifest was changed, or a file of it is gone;
            nothing is ever deleted for that.
    """
    final = _name_directory(workdir, label, key)
    if not os.path.lexists(final):
        return None
    artifact = read_artifact(final, REMAKE)
    if artifact.key != key or artifact.manifest["label"] != label:
        raise ArtifactError(
            f"{final}: holds {artifact.manifest['label']!r} of key {artifact.key}; must be {label!r} of key {key}; "
            f"{REMAKE}"
        )
    for mismatch in find_mismatches(artifact, None):
        raise ArtifactError(f"{final}: {mismatch}; {REMAKE}")
    return artifact


def find_manifests(workdir: Path, label: str) -> Iterator[dict[str, Any]]:
    """Manifests of all sealed artifacts of a label.

    An unreadable manifest is skipped.
    """
    for directory in sorted(workdir.glob(f"{label}-*")):
        if is_digest(directory.name.removeprefix(f"{label}-").ljust(64, "0")):
            with suppress(ArtifactError):
                yield read_artifact(directory, REMAKE).manifest


@contextmanager
def build(workdir: Path, label: str, key: str) -> Iterator[Draft]:
    """A fresh directory in which an artifact is made.

    The caller holds the lock and has asked `find`, and must call the draft's `seal`. An exception in the block deletes
    the directory and goes on unchanged. What a killed run left behind is deleted first.

    Raises:
        ArtifactError: the directory cannot be made.
    """
    final = _name_directory(workdir, label, key)
    assert find(workdir, label, key) is None, f"{final}: already made"
    draft = Draft(final.with_name(f"{final.name}.partial"), final, label, key)
    with tell_os_errors(draft.directory):
        _delete(draft.directory)
        draft.directory.mkdir()
    try:
        yield draft
        assert draft.artifact is not None, f"{final}: never sealed"
    except BaseException as error:
        try:
            _delete(draft.directory)
        except OSError as second:
            error.add_note(f"{draft.directory}: could not be deleted ({second.strerror}); the next run will try again")
        raise


def resume_directory(workdir: Path, label: str, key: str) -> Path:
    """The directory in which a resumable stage keeps its progress.

    It outlives a killed run, and goes when the artifact is sealed.
    """
    final = _name_directory(workdir, label, key)
    return final.with_name(f"{final.name}.resume")


def delete_leftovers(workdir: Path, stages: Collection[str], finished: Collection[str] = ()) -> None:
    """Delete leftovers of killed runs that no stage will resume.

    The caller holds the lock, so no process writes there. That is every unfinished artifact, and what a stage kept for
    being taken up where its artifact is sealed, or where its label is among those `finished` with other settings. What
    cannot be deleted is left for the next run.
    """
    with suppress(OSError):
        for path in sorted(workdir.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if found is None or found["label"].partition("-")[0] not in stages or path.is_symlink():
                continue
            if found["kind"] == "partial" or found["label"] in finished or path.with_suffix("").is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _name_directory(workdir: Path, label: str, key: str) -> Path:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label), f"label {label!r}"
    assert not label.endswith(".partial"), f"label {label!r}"
    assert is_digest(key), f"key {key!r}"
    return workdir / f"{label}-{key[:12]}"


def _open_modes(directory: Path) -> None:
    """Give files and folders the umask's modes, whatever their writers chose.

    Safetensors' own writer lets only the owner read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for parent, _, names in os.walk(directory):
        for path in (Path(parent), *(Path(parent) / name for name in names)):
            mode, wanted = stat.S_IMODE(path.lstat().st_mode), (0o777 if path.is_dir() else 0o666) & ~umask
            if not path.is_symlink() and mode | wanted != mode:
                path.chmod(mode | wanted)


def _record_files(directory: Path, progress: Progress | None) -> dict[str, dict[str, JSON]]:
    """Size, digest and link target of each file, by name.

    Each file is forced to disk.
    """
    paths = list(walk_files(directory))
    for path in paths:
        if not path.is_file():
            kind = f"{describe_link(os.readlink(path))}, which is no file" if path.is_symlink() else "not a file"
            raise ArtifactError(f"{path}: {kind}; an artifact may hold only files and links to files")
    advance = count_bytes("hashing files", sum(path.stat().st_size for path in paths), progress)
    files: dict[str, dict[str, JSON]] = {}
    for path in paths:
        digest = digest_known(path, advance) if path.is_symlink() else digest_file(path, advance)
        record: dict[str, JSON] = {"size": path.stat().st_size, "sha256": digest}
        if path.is_symlink():
            record["link"] = os.readlink(path)
            assert directory.name not in Path(os.readlink(path)).parts, (
                f"{path}: names the directory, which is about to be renamed"
            )
        else:
            sync(path)
        files[path.relative_to(directory).as_posix()] = record
    return files


def _delete(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
