"""Artifacts are whole or absent, and tell when they were touched."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from told import tells

from dense2moe.convert.artifact.keys import artifact_key, code_digest
from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.artifact.manifest import Artifact, open_artifact
from dense2moe.convert.artifact.sealing import build, find
from dense2moe.convert.artifact.verification import check_files, verify
from dense2moe.convert.errors import ArtifactError

ROOT = Path(__file__).parent.parent
KEY = artifact_key({"source": "a" * 64}, {"num_experts": 4}, "code")
DIRECTORY = f"upcycle-{KEY[:12]}"
SEAL: dict[str, Any] = {
    "inputs": {"source": "a" * 64},
    "settings": {"num_experts": 4},
    "facts": {"perplexity": 12.5},
    "versions": {"torch": "2"},
    "seed": 7,
}


def make(workdir: Path, key: str = KEY) -> Artifact:
    with build(workdir, "upcycle", key) as draft:
        (draft.directory / "config.json").write_text("{}")
        (draft.directory / "onnx").mkdir()
        (draft.directory / "onnx" / "model.onnx").write_bytes(b"weights")
        return draft.seal(**SEAL)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def process(script: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed "ready"; killed at the end, and by `kill` before that."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


def test_a_sealed_artifact_is_found_opened_and_verified(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert names(tmp_path) == [DIRECTORY]
    assert find(tmp_path, "upcycle", KEY) == open_artifact(tmp_path / DIRECTORY) == made
    assert verify(made.directory) == []
    assert made.key == KEY and made.facts == {"perplexity": 12.5}
    assert made.manifest["files"] == {
        "config.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "onnx/model.onnx": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
    }


def test_an_artifact_may_be_moved(tmp_path: Path) -> None:
    assert verify(make(tmp_path).directory.rename(tmp_path / "published")) == []


def test_what_was_never_made_is_not_found(tmp_path: Path) -> None:
    assert find(tmp_path, "upcycle", KEY) is None


def test_the_key_is_the_digest_of_canonical_json() -> None:
    text = '{"code":"c","dense2moe":2,"inputs":{"a":"1","b":"2"},"settings":{"x":[1,null],"y":0.5}}'
    key = artifact_key({"b": "2", "a": "1"}, {"y": 0.5, "x": (1, None)}, "c")
    assert key == hashlib.sha256(text.encode()).hexdigest()


def test_a_changed_setting_makes_another_directory(tmp_path: Path) -> None:
    other = artifact_key({"source": "a" * 64}, {"num_experts": 8}, "code")
    make(tmp_path), make(tmp_path, other)
    assert names(tmp_path) == sorted([DIRECTORY, f"upcycle-{other[:12]}"])


def test_the_code_digest_changes_with_any_source_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sample_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    template = package / "inner" / "card.j2"
    template.write_text("one")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest("sample_package", "dense2moe.convert")
    (package / "notes.txt").write_text("not code")
    assert code_digest("dense2moe.convert", "sample_package") == before
    template.write_text("two")
    assert code_digest("sample_package", "dense2moe.convert") != before
    (tmp_path / "sample_module.py").write_text("one = 1")
    alone = code_digest("sample_module")
    (tmp_path / "sample_module.py").write_text("one = 2")
    assert code_digest("sample_module") != alone


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_exception_goes_on_and_leaves_nothing(tmp_path: Path, exception: type[BaseException] | OSError) -> None:
    with pytest.raises(BaseException) as caught, build(tmp_path, "upcycle", KEY) as draft:
        (draft.directory / "half").touch()
        raise exception
    assert caught.value is exception or caught.type is exception
    assert names(tmp_path) == []


def test_a_draft_that_is_never_sealed_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never sealed"), build(tmp_path, "upcycle", KEY):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_not_json_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"), build(tmp_path, "upcycle", KEY) as draft:
        draft.seal(**SEAL | {"settings": {"rate": value}})
    assert names(tmp_path) == []


def test_facts_that_are_not_finite_come_back_as_they_were(tmp_path: Path) -> None:
    """In strict JSON, and told from texts of the same letters."""
    numbers = {"loss": math.nan, "layers": ({"error": math.inf}, {"error": -math.inf}, {"error": 0.5})}
    texts = {
        "origin": "NaN",
        "domains": ["Infinity", "float"],
        "odd": {"float": "text"},
        "odder": {"float": "NaN", "b": 1},
    }
    with build(tmp_path, "upcycle", KEY) as draft:
        sealed = draft.seal(**SEAL | {"facts": numbers | texts})
    json.loads((sealed.directory / "manifest.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    found = find(tmp_path, "upcycle", KEY)
    for artifact in (sealed, found):
        assert math.isnan(artifact.facts["loss"])
        assert [layer["error"] for layer in artifact.facts["layers"]] == [math.inf, -math.inf, 0.5]
        assert {name: artifact.facts[name] for name in texts} == texts
    assert verify(sealed.directory) == []


def test_all_is_forced_to_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    make(tmp_path)
    partial = f"{tmp_path / DIRECTORY}.partial"
    files, manifest, folders = ["/config.json", "/onnx/model.onnx"], ["/manifest.json"], ["", "/onnx"]
    assert synced == [f"{partial}{name}" for name in files + manifest + folders] + [str(tmp_path)]


def test_the_name_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(source: Path, target: Path) -> None:
        assert names(source) == ["config.json", "manifest.json", "onnx"] and not target.exists()
        raise PermissionError(errno.EACCES, "denied", str(target))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ArtifactError, match=f"{DIRECTORY}: no permission"):
        make(tmp_path)
    assert names(tmp_path) == []


def test_kill_in_the_middle_leaves_a_partial_and_the_next_build_is_clean(tmp_path: Path) -> None:
    script = """
import sys, time; from pathlib import Path; from dense2moe.convert.artifact.sealing import build
with build(Path(sys.argv[1]), "upcycle", sys.argv[2]) as draft:
    (draft.directory / "half").write_text("half"); print("ready", flush=True); time.sleep(60)
"""
    with process(script, tmp_path, KEY) as running:
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert names(tmp_path) == [f"{DIRECTORY}.partial"]
    assert find(tmp_path, "upcycle", KEY) is None
    assert verify(make(tmp_path).directory) == []
    assert names(tmp_path) == [DIRECTORY]
    assert not (tmp_path / DIRECTORY / "half").exists()


def test_the_lock_keeps_others_out_until_its_holder_is_killed(tmp_path: Path) -> None:
    workdir = tmp_path / "a" / "work"
    script = """
import sys, time; from pathlib import Path; from dense2moe.convert.artifact.locking import lock
with lock(Path(sys.argv[1])):
    print("ready", flush=True); time.sleep(60)
"""
    with process(script, workdir) as running:
        with pytest.raises(ArtifactError) as caught, lock(workdir):
            pass
        assert str(caught.value) == (
            f"{workdir}: another run (process {running.pid}) is using this work directory; wait for it to end, or "
            "give another --workdir"
        )
        running.kill()
        running.wait()
        with lock(workdir):
            assert (workdir / ".lock").read_text() == str(os.getpid())
    with lock(workdir):
        pass


def test_a_work_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for workdir in (file, file / "below"):
        with pytest.raises(ArtifactError) as caught, lock(workdir):
            pass
        assert tells(str(caught.value), workdir, "a file is in the way", "move it away", "--workdir")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def flip(directory: Path) -> str:
    (directory / "onnx" / "model.onnx").write_bytes(b"wEights")
    return f"onnx/model.onnx: SHA-256 {digest(b'wEights')}...; must be {digest(b'weights')}..."


def truncate(directory: Path) -> str:
    os.truncate(directory / "onnx" / "model.onnx", 3)
    return "onnx/model.onnx: 3 bytes; must be 7"


def add(directory: Path) -> str:
    (directory / "onnx" / "new\nline").touch()
    return "onnx/new\\nline: extra; not in the manifest"


def remove(directory: Path) -> str:
    (directory / "onnx" / "model.onnx").unlink()
    return "onnx/model.onnx: missing"


def put_a_folder(directory: Path) -> str:
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    return "config.json: not a file"


def put_a_pipe(directory: Path) -> str:
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    return "config.json: not a file"


def put_a_link(directory: Path) -> str:
    (directory / "config.json").rename(directory.parent / "elsewhere")
    (directory / "config.json").symlink_to("../elsewhere")
    return "config.json: link to '../elsewhere'; must be no link"


@pytest.mark.parametrize("damage", [flip, truncate, add, remove, put_a_folder, put_a_pipe, put_a_link])
def test_damage_is_found(tmp_path: Path, damage: Any) -> None:
    directory = make(tmp_path).directory
    line = damage(directory)
    assert verify(directory) == [line]


@pytest.mark.parametrize("damage", [truncate, remove])
def test_an_artifact_with_a_damaged_file_is_not_reused_and_not_deleted(tmp_path: Path, damage: Any) -> None:
    directory = make(tmp_path).directory
    line = damage(directory)
    with pytest.raises(ArtifactError) as caught:
        find(tmp_path, "upcycle", KEY)
    assert str(caught.value) == f"{directory}: {line}; move the directory away, and it will be made again"
    assert directory.is_dir()


def test_a_folder_replaced_by_a_link_is_found(tmp_path: Path) -> None:
    directory = make(tmp_path).directory
    (directory / "onnx").rename(tmp_path / "elsewhere")
    (directory / "onnx").symlink_to("../elsewhere")
    assert verify(directory) == ["onnx/model.onnx: missing", "onnx: extra; not in the manifest"]


def test_links_to_files_are_hashed_through_and_watched(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"weights")
    with build(tmp_path, "upcycle", KEY) as draft:
        (draft.directory / "model").symlink_to("../target")
        made = draft.seal(**SEAL)
    assert made.manifest["files"] == {
        "model": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest(), "link": "../target"}
    }
    assert verify(made.directory) == []
    target.write_bytes(b"wEights")
    assert verify(made.directory) == [f"model: SHA-256 {digest(b'wEights')}...; must be {digest(b'weights')}..."]
    target.unlink()
    assert verify(made.directory) == ["model: broken link to '../target'"]
    (made.directory / "model").unlink()
    (made.directory / "model").symlink_to("other")
    assert verify(made.directory) == ["model: link to 'other'; must be link to '../target'"]


@pytest.mark.parametrize("target", ["nowhere", "..", "model"])
def test_other_links_are_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ArtifactError) as caught, build(tmp_path, "upcycle", KEY) as draft:
        (draft.directory / "model").symlink_to(target)
        draft.seal(**SEAL)
    path = tmp_path / f"{DIRECTORY}.partial" / "model"
    assert (
        str(caught.value)
        == f"{path}: link to {target!r}, which is no file; an artifact may hold only files and links to files"
    )


def test_a_link_that_sealing_would_break_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="about to be renamed"), build(tmp_path, "upcycle", KEY) as draft:
        (draft.directory / "a").touch()
        (draft.directory / "b").symlink_to(draft.directory / "a")
        draft.seal(**SEAL)


MEND = "give an artifact, a work directory, or a package with SHA256SUMS"


def edit(directory: Path, **changes: Any) -> Path:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", ".", "manifest.json", "new\nline", "\x1b[2J"]
)
def test_a_hostile_path_is_refused(tmp_path: Path, name: str) -> None:
    directory = make(tmp_path).directory
    path = edit(directory, files={name: {"size": 0, "sha256": "0" * 64}})
    for read in (open_artifact, verify):
        with pytest.raises(ArtifactError) as caught:
            read(directory)
        assert (
            str(caught.value) == f"{path}: path {name!r} in 'files'; must be a plain path inside the artifact; {MEND}"
        )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"dense2moe": 1},
            "'dense2moe' is 1; must be 2; made by another version of dense2moe, and made anew by a run with this one",
        ),
        (
            {"dense2moe": 3},
            "'dense2moe' is 3; must be 2; made by another version of dense2moe, and made anew by a run with this one",
        ),
        ({"dense2moe": None}, "'dense2moe' is None; must be 2"),
        ({"key": "abc"}, "'key' is 'abc'; must be 64 hex digits"),
        ({"sha256": "ABC"}, "'sha256' is 'ABC'; must be 64 hex digits"),
        ({"sha256": None}, "'sha256' is None; must be of type str"),
        ({"label": None}, "'label' is None; must be of type str"),
        ({"files": []}, "'files' is []; must be of type dict"),
        ({"files": {"a": 1}}, "'files' has 1 for a; must be an object with a size in bytes"),
        ({"files": {"a": {"size": -1}}}, "'files' has {'size': -1} for a; must be an object with a size in bytes"),
        (
            {"files": {"a": {"size": 1}}},
            "'files' has {'size': 1} for a; must have 64 hex digits as sha256, and text as link if any",
        ),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    directory = make(tmp_path).directory
    path = edit(directory, **changes)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(directory)
    assert str(caught.value) == f"{path}: {fault}; {MEND}"


# The manifest's own digest


def test_the_manifest_holds_the_digest_of_canonical_json_of_all_else_in_it(tmp_path: Path) -> None:
    manifest = json.loads((make(tmp_path).directory / "manifest.json").read_text())
    created = manifest["created"]
    files = ",".join(
        f'"{name}":{{"sha256":"{hashlib.sha256(data).hexdigest()}","size":{len(data)}}}'
        for name, data in (("config.json", b"{}"), ("onnx/model.onnx", b"weights"))
    )
    text = (
        f'{{"created":"{created}","dense2moe":2,"facts":{{"perplexity":12.5}},"files":{{{files}}},'
        f'"inputs":{{"source":"{"a" * 64}"}},"key":"{KEY}",'
        '"label":"upcycle","seed":7,"settings":{"num_experts":4},"versions":{"torch":"2"}}'
    )
    assert manifest["sha256"] == hashlib.sha256(text.encode()).hexdigest()


CHANGES: dict[str, Any] = {
    "facts": {"perplexity": 12.4},
    "settings": {},
    "inputs": {"source": "b" * 64},
    "versions": {"torch": "3"},
    "seed": 8,
    "created": "2020-01-01T00:00:00+00:00",
    "sha256": "0" * 64,
    "note": "added",
}


@pytest.mark.parametrize("field", CHANGES)
def test_whatever_is_changed_in_a_manifest_is_noticed_by_every_reader(field: str, tmp_path: Path) -> None:
    directory = make(tmp_path).directory
    sealed = json.loads((directory / "manifest.json").read_text())["sha256"]
    path = edit(directory, **{field: CHANGES[field]})
    if field == "sha256":
        fault = f"was changed after it was sealed: SHA-256 of its content {sealed[:12]}...; must be 000000000000..."
    else:
        content = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
        found = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert found != sealed
        fault = f"was changed after it was sealed: SHA-256 of its content {found[:12]}...; must be {sealed[:12]}..."
    assert verify(directory) == [f"manifest.json: {fault}"]
    for read in (lambda: open_artifact(directory), lambda: find(tmp_path, "upcycle", KEY)):
        with pytest.raises(ArtifactError) as caught:
            read()
        assert tells(str(caught.value), path, fault, "move the directory away")


def test_a_changed_manifest_hides_no_changed_file(tmp_path: Path) -> None:
    directory = make(tmp_path).directory
    line = flip(directory)
    edit(directory, facts={})
    changed, *others = verify(directory)
    assert changed.startswith("manifest.json: was changed after it was sealed") and others == [line]


def test_a_manifest_that_is_only_written_in_another_way_is_the_same(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = made.directory / "manifest.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    assert open_artifact(made.directory) == made and verify(made.directory) == []


def test_what_an_older_version_made_is_left_where_it_is_and_made_anew(tmp_path: Path) -> None:
    """By the layout without a digest, whose number was in its key."""
    text = json.dumps(
        {"code": "code", "dense2moe": 1, "inputs": {"source": "a" * 64}, "settings": {"num_experts": 4}}, sort_keys=True
    )
    old_key = hashlib.sha256(text.replace(", ", ",").replace(": ", ":").encode()).hexdigest()
    old = tmp_path / f"upcycle-{old_key[:12]}"
    make(tmp_path).directory.rename(old)
    manifest = json.loads((old / "manifest.json").read_text()) | {"dense2moe": 1, "key": old_key}
    del manifest["sha256"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert find(tmp_path, "upcycle", KEY) is None
    assert verify(make(tmp_path).directory) == []
    assert names(tmp_path) == sorted([old.name, DIRECTORY])


# Files that a stage is to read


def test_files_are_read_before_something_is_made_of_them(tmp_path: Path) -> None:
    made = make(tmp_path)
    seen: list[tuple[str, int, int]] = []
    check_files(made, lambda *step: seen.append(step))
    assert seen == [("checking files of upcycle", 2, 9), ("checking files of upcycle", 9, 9)]
    line = flip(made.directory)
    assert find(tmp_path, "upcycle", KEY) == made  # its size is what it was
    with pytest.raises(ArtifactError) as caught:
        check_files(made)
    assert tells(str(caught.value), made.directory, line, "move the directory away")


def test_files_that_are_too_large_to_be_read_are_left_alone(tmp_path: Path) -> None:
    made = make(tmp_path)
    flip(made.directory)
    check_files(made, largest_bytes=6)
    with pytest.raises(ArtifactError, match=r"onnx/model\.onnx"):
        check_files(made, largest_bytes=7)
    (made.directory / "config.json").write_bytes(b"[]")
    with pytest.raises(ArtifactError, match=r"config\.json: SHA-256"):
        check_files(made, largest_bytes=6)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"seed": NaN}'])
def test_a_manifest_that_is_not_json_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    directory = make(tmp_path).directory
    (directory / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not JSON") as caught:
        open_artifact(directory)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: no such directory; {MEND}"
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no manifest.json, so not a sealed artifact; {MEND}"


def test_something_else_under_the_final_name_is_named_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / DIRECTORY
    directory.mkdir()
    with pytest.raises(ArtifactError) as caught:
        find(tmp_path, "upcycle", KEY)
    assert tells(str(caught.value), directory, "no manifest.json", "move the directory away")
    directory.rmdir()
    other = "0" * 64
    shutil.copytree(make(tmp_path, other).directory, directory)
    with pytest.raises(ArtifactError) as caught:
        find(tmp_path, "upcycle", KEY)
    assert str(caught.value) == (
        f"{directory}: holds 'upcycle' of key {other}; must be 'upcycle' of key {KEY}; move the directory away, and it "
        "will be made again"
    )


@pytest.mark.parametrize(("in_block", "limit_bytes"), [(True, 1000), (False, 100)])
def test_a_file_past_the_size_limit_is_one_line_and_leaves_nothing(
    tmp_path: Path, in_block: bool, limit_bytes: int
) -> None:
    script = """
import resource, sys; from pathlib import Path
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.artifact.disk import describe_os_error
workdir, key, in_block, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); print("ready", flush=True)
try:
    with build(workdir, "upcycle", key) as draft:
        (draft.directory / "model").write_bytes(bytes(2000 if in_block else 10))
        draft.seal(inputs={}, settings={}, facts={}, versions={}, seed=0)
except ArtifactError as error:
    print(error)
except OSError as error:
    print(describe_os_error(error, draft.directory))
"""
    with process(script, tmp_path, KEY, str(in_block), str(limit_bytes)) as running:
        assert running.stdout is not None
        assert running.stdout.read() == (
            f"{tmp_path / DIRECTORY}.partial: a file grew past the largest size allowed; "
            "raise the limit (ulimit -f), or give a --workdir on another file system\n"
        )
    assert names(tmp_path) == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with build(tmp_path, "upcycle", KEY) as draft:
        (draft.directory / "a").write_bytes(bytes(3))
        (draft.directory / "b").write_bytes(bytes(4))
        made = draft.seal(**SEAL, progress=lambda *step: seen.append(step))
    verify(made.directory, lambda *step: seen.append(step))
    assert seen == [(what, done, 7) for what in ("hashing files", "verifying files") for done in (3, 7)]
