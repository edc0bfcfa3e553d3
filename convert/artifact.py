"""Artifacts: sealed stage outputs in a work directory.

A work directory holds one directory an artifact, `<label>-<first 12 hex digits of its key>`. While a stage writes, the
name ends in `.partial`; sealing records every file in `manifest.json`, forces everything to disk and renames once. So a
directory without `.partial` is whole, whenever the power went, and another setting, input or version of the code is
another key and another directory. The manifest holds a digest of itself, which every reading checks: facts that were
edited are noticed, and so are files, through their digests, before a stage reads them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
from rich.filesize import decimal

from dense2moe.upcycle.durable import sync
from dense2moe.upcycle.errors import MendableError
from dense2moe.upcycle.numbers import name_special

if (
    TYPE_CHECKING
):  # only the type: importing it would load torch, and this module also serves commands that must answer at once
    from dense2moe.upcycle.progress import Progress

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT = 2
"""Version of the manifest's layout; part of every key, so a new layout never meets an old directory."""
MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"

_SEAL = "sha256"
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
    _SEAL: str,
}
_SOURCE_SUFFIXES = (".py", ".j2")
_CHUNK_BYTES = 1 << 20
_LEFTOVER = re.compile(r"(?P<label>[a-z0-9][a-z0-9._-]*)-[0-9a-f]{12}\.(?P<kind>partial|resume)")
_PATIENCE_SECONDS, _MOMENT_SECONDS = 10.0, 0.05
_REMAKE = "move the directory away, and it will be made again"
_GIVE = "give the directory of a sealed artifact"


class ArtifactError(MendableError):
    """Something about a work directory or an artifact that the user can mend; its text is one line."""


@dataclass(frozen=True)
class Artifact:
    """A sealed directory and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """What it was made from, in 64 hex digits."""
        return str(self.manifest["key"])

    @property
    def facts(self) -> dict[str, Any]:
        """What its stage found."""
        facts: dict[str, Any] = _restore_specials(self.manifest["facts"])
        return facts


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
        """Hash and record every file, force it all to disk, and give the directory its final name.

        Modes are as the umask says.

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
            "facts": _mark_specials(dict(facts)),
            "versions": dict(versions),
            "seed": seed,
        }
        with _one_line_errors(self.directory):
            _open_modes(self.directory)
            manifest["files"] = _record_files(self.directory, progress)
            manifest[_SEAL] = _digest_manifest(manifest)
            fault = _find_fault(manifest)
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


def artifact_key(inputs: Mapping[str, str], settings: Mapping[str, JSON], code: str) -> str:
    """The key, 64 hex digits, of what a stage makes from inputs (their keys), settings, and code (its digest)."""
    return _digest_json({"dense2moe": FORMAT, "inputs": dict(inputs), "settings": dict(settings), "code": code})


def code_digest(*packages: str) -> str:
    """SHA-256 of our version and of every source file in the named import packages.

    The order of the names does not matter.
    """
    sources: dict[str, str] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package}: not installed"
        assert spec.submodule_search_locations, f"{package}: not an import package"
        for root in map(Path, spec.submodule_search_locations):
            for path in _walk(root):
                if path.suffix in _SOURCE_SUFFIXES:
                    sources[f"{package}/{path.relative_to(root).as_posix()}"] = hashlib.sha256(
                        path.read_bytes()
                    ).hexdigest()
    try:
        version = importlib.metadata.version("dense2moe")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed: the sources say it all
        version = ""
    return _digest_json({"version": version, "sources": sources})


@contextmanager
def lock(workdir: Path) -> Iterator[int]:
    """Make the work directory if need be, and hold it for this process alone.

    The kernel lets go when the process dies, however it dies. Yields the open file: a process that is given it holds
    the directory as well, until both have died. Where the one that is named in the file is dead, its last process is
    given a while; another one a moment, since `is_locked` holds the lock as long as it looks.

    Raises:
        ArtifactError: another run holds it, or it is not a directory that we can write.
    """
    with _one_line_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _one_line_errors(workdir):
            began = time.monotonic()
            while not _try_lock(file):
                process = os.pread(file, 20, 0).decode("ascii", "replace")
                is_dead = process.isdigit() and not psutil.pid_exists(int(process))
                if time.monotonic() < began + (_PATIENCE_SECONDS if is_dead else 2 * _MOMENT_SECONDS):
                    time.sleep(_MOMENT_SECONDS)
                    continue
                holder = f"another run (process {process})" if process.isdigit() else "another run"
                raise ArtifactError(
                    f"{workdir}: {holder} is using this work directory; wait for it to end, or give another --workdir"
                )
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        yield file
    finally:
        os.close(file)


def is_locked(workdir: Path) -> bool:
    """Whether a process holds the lock of a work directory.

    Raises:
        ArtifactError: the lock cannot be read.
    """
    with _one_line_errors(workdir):
        try:
            file = os.open(workdir / LOCK_NAME, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(file, fcntl.LOCK_SH)
        finally:
            os.close(file)


def _try_lock(file: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    artifact = _open(final, _REMAKE)
    if artifact.key != key or artifact.manifest["label"] != label:
        raise ArtifactError(
            f"{final}: holds {artifact.manifest['label']!r} of key {artifact.key}; must be {label!r} of key {key}; "
            f"{_REMAKE}"
        )
    for mismatch in _mismatches(artifact, None):
        raise ArtifactError(f"{final}: {mismatch}; {_REMAKE}")
    return artifact


def check_files(artifact: Artifact, progress: Progress | None = None, largest_bytes: int | None = None) -> None:
    """Read the files of an artifact, or those of at most `largest_bytes`, before something is made of them.

    Raises:
        ArtifactError: a file is not as the manifest says; nothing is ever deleted for that.
    """
    files = artifact.manifest["files"]
    names = [name for name, record in files.items() if largest_bytes is None or record["size"] <= largest_bytes]
    advance = _count_bytes(
        f"checking files of {artifact.manifest['label']}", sum(files[name]["size"] for name in names), progress
    )
    for mismatch in _mismatches(artifact, lambda path: digest_file(path, advance), names):
        raise ArtifactError(f"{artifact.directory}: {mismatch}; {_REMAKE}")


@contextmanager
def build(workdir: Path, label: str, key: str) -> Iterator[Draft]:
    """A fresh directory to make an artifact in.

    The caller holds the lock and has asked `find`, and must call the draft's `seal`. An exception in the block deletes
    the directory and goes on unchanged. What a killed run left behind is deleted first.

    Raises:
        ArtifactError: the directory cannot be made.
    """
    final = _name_directory(workdir, label, key)
    assert find(workdir, label, key) is None, f"{final}: already made"
    draft = Draft(final.with_name(f"{final.name}.partial"), final, label, key)
    with _one_line_errors(draft.directory):
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


def open_artifact(directory: Path) -> Artifact:
    """The artifact in a directory, wherever that lies and whatever its name.

    Raises:
        ArtifactError: there is none, or its manifest is malformed, was changed or names a path outside the directory.
    """
    return _open(directory, _GIVE)


def verify(directory: Path, progress: Progress | None = None) -> list[str]:
    """Every way in which the manifest differs from its own digest and the files from the manifest, a line each.

    Empty when all is well.

    Raises:
        ArtifactError: as `open_artifact`, but for a manifest that was changed, or a folder cannot be listed.
    """
    artifact = _open(directory, _GIVE, sealed=False)
    broken = _find_broken_seal(artifact.manifest)
    files: dict[str, dict[str, Any]] = artifact.manifest["files"]
    advance = _count_bytes("verifying files", sum(record["size"] for record in files.values()), progress)
    with _one_line_errors(directory):
        names = {path.relative_to(directory).as_posix() for path in _walk(directory)}
        extra = [
            f"{repr(name)[1:-1]}: extra; not in the manifest" for name in sorted(names - files.keys() - {MANIFEST_NAME})
        ]
        changed = [f"{MANIFEST_NAME}: {broken}"] if broken else []
        return [*changed, *_mismatches(artifact, lambda path: digest_file(path, advance)), *extra]


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        ArtifactError: the file system that holds the directory, or will hold it, has fewer bytes free.
    """
    with _one_line_errors(directory):
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        needed, free = decimal(needed_bytes), decimal(free_bytes)
        raise ArtifactError(
            f"{directory}: {free} free on this disk; {needed} needed; free some space, or give another --workdir"
        )


def describe_os_error(error: OSError, directory: Path, option: str = "--workdir") -> str:
    """One line on where (the error's own path, or else `directory`), what happened, and how to mend it.

    By another `option` if need be.
    """
    match error.errno:
        case errno.ENOSPC:
            what, mend = "the disk is full", f"free some space, or give another {option}"
        case errno.EDQUOT:
            what, mend = "your disk quota is used up", f"free some space, or give another {option}"
        case errno.EFBIG:
            what, mend = (
                "a file grew past the largest size allowed",
                f"raise the limit (ulimit -f), or give a {option} on another file system",
            )
        case errno.EACCES | errno.EPERM:
            what, mend = (
                "no permission; must be yours to read and write",
                f"change its owner or mode, or give another {option}",
            )
        case errno.EROFS:
            what, mend = "no write permission: the file system is read-only", f"give another {option}"
        case errno.ENOTDIR | errno.EEXIST:
            what, mend = "a file is in the way; must be a directory", f"move it away, or give another {option}"
        case errno.EISDIR:
            what, mend = "a directory is in the way; must be a file", f"move it away, or give another {option}"
        case errno.EIO | errno.ENXIO | errno.ENODEV | errno.ESTALE:
            what, mend = (
                f"the disk fails ({error.strerror})",
                f"look at the disk, or give another {option}, and run again",
            )
        case errno.ENOENT:
            what, mend = "is gone; must stay while it is used", "put it back, or run again"
        case errno.EMFILE | errno.ENFILE:
            what, mend = "too many files are open", "raise the limit (ulimit -n), and run again"
        case errno.ENAMETOOLONG:
            what, mend = "the name is too long", f"give a shorter {option}"
        case errno.ELOOP:
            what, mend = "links lead in a circle", "remove one of them"
        case _:
            what, mend = (
                error.strerror or " ".join(str(error).split()) or type(error).__name__,
                f"mend that, or give another {option}, and run again",
            )
    return f"{error.filename if isinstance(error.filename, str) else directory}: {what}; {mend}"


@contextmanager
def _one_line_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(describe_os_error(error, directory)) from error


def resume_directory(workdir: Path, label: str, key: str) -> Path:
    """Where a stage that can be taken up again keeps what it needs for that.

    It outlives a killed run, and goes when the artifact is sealed.
    """
    final = _name_directory(workdir, label, key)
    return final.with_name(f"{final.name}.resume")


def delete_leftovers(workdir: Path, stages: Collection[str], finished: Collection[str] = ()) -> None:
    """Delete what killed runs of these stages left and none will take up.

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
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", label), f"label {label!r}"
    assert not label.endswith(".partial"), f"label {label!r}"
    assert _is_digest(key), f"key {key!r}"
    return workdir / f"{label}-{key[:12]}"


def _open(directory: Path, mend: str, sealed: bool = True) -> Artifact:
    """The artifact in a directory; `sealed`: its manifest must be as it was written."""
    path = directory / MANIFEST_NAME
    with _one_line_errors(directory):
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
    fault = _find_fault(manifest)
    if fault:
        raise ArtifactError(f"{path}: {fault}; {mend}")
    if sealed and (broken := _find_broken_seal(manifest)):
        raise ArtifactError(f"{path}: {broken}; {_REMAKE}")
    return Artifact(directory, manifest)


def _mark_specials(value: Any) -> Any:
    """Facts as strict JSON.

    NaN and infinities are objects of one key, {"float": "NaN"}, so that no text of a user's can be taken for one.
    """
    match value:
        case Mapping():
            return {key: _mark_specials(item) for key, item in value.items()}
        case list() | tuple():
            return [_mark_specials(item) for item in value]
        case float() if name := name_special(value):
            return {"float": name}
        case _:
            return value


def _restore_specials(value: Any) -> Any:
    """What `_mark_specials` was given."""
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


def _find_fault(manifest: object) -> str | None:
    """What is wrong with a manifest: its layout, or a path that leaves the directory or would spoil a line of text."""
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
    for field in ("key", _SEAL):
        if not _is_digest(manifest[field]):
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
        if not _is_digest(record.get("sha256")) or not isinstance(record.get("link", ""), str):
            return f"'files' has {record!r:.80} for {name}; must have 64 hex digits as sha256, and text as link if any"
    return None


def _find_broken_seal(manifest: Mapping[str, Any]) -> str | None:
    """Whether the content of a manifest is another than was sealed, in words."""
    found, sealed = _digest_manifest(manifest), manifest[_SEAL]
    return (
        None
        if found == sealed
        else f"was changed after it was sealed: SHA-256 of its content {found[:12]}...; must be {sealed[:12]}..."
    )


def _digest_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all in a manifest but this digest, as reading it gives it back."""
    return _digest_json(
        json.loads(json.dumps({name: value for name, value in manifest.items() if name != _SEAL}, allow_nan=False))
    )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _open_modes(directory: Path) -> None:
    """Give files and folders the modes that the umask says, whatever their writers gave them.

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
    """Name to size, digest and link target of every file, each forced to disk."""
    paths = list(_walk(directory))
    for path in paths:
        if not path.is_file():
            kind = f"{_describe_link(os.readlink(path))}, which is no file" if path.is_symlink() else "not a file"
            raise ArtifactError(f"{path}: {kind}; an artifact may hold only files and links to files")
    advance = _count_bytes("hashing files", sum(path.stat().st_size for path in paths), progress)
    files: dict[str, dict[str, JSON]] = {}
    for path in paths:
        record: dict[str, JSON] = {"size": path.stat().st_size, "sha256": digest_file(path, advance)}
        if path.is_symlink():
            record["link"] = os.readlink(path)
            assert directory.name not in Path(os.readlink(path)).parts, (
                f"{path}: names the directory, which is about to be renamed"
            )
        else:
            sync(path)
        files[path.relative_to(directory).as_posix()] = record
    return files


def _mismatches(
    artifact: Artifact, digest: Callable[[Path], str] | None, names: Sequence[str] | None = None
) -> Iterator[str]:
    """A line for each recorded file, or each of `names`, that is not as recorded.

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
        return f"{_describe_link(link)}; must be {_describe_link(expected_link)}"
    if not path.is_file():
        return "not a file" if link is None else f"broken {_describe_link(link)}"
    if path.stat().st_size != record["size"]:
        return f"{path.stat().st_size} bytes; must be {record['size']}"
    if digest and (found := digest(path)) != record["sha256"]:
        return f"SHA-256 {found[:12]}...; must be {record['sha256'][:12]}..."
    return None


def _describe_link(target: str | None) -> str:
    return "no link" if target is None else f"link to {target!r}"


def _walk(directory: Path) -> Iterator[Path]:
    """All that is not a directory, sorted; links are not followed.

    Unlike `Path.rglob`, a folder that cannot be listed is an error.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _delete(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def digest_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file in 64 hex digits; `advance` is told how many bytes were read.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _count_bytes(what: str, total_bytes: int, progress: Progress | None) -> Callable[[int], None]:
    done_bytes = 0

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        if progress:
            progress(what, done_bytes, total_bytes)

    return advance


def _digest_json(value: Mapping[str, JSON]) -> str:
    """SHA-256 of the one way to write a value: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    ).hexdigest()
