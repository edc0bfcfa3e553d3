"""A source is hashed once: known again by path, size, inode and times, and never after an edit."""

from __future__ import annotations

import hashlib
import mmap
import os
import posix
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import dense2moe

from dense2moe.convert.artifact import known
from dense2moe.convert.artifact.known import digest_known, find_claimed

BYTES = b"0123456789" * 200_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("DENSE2MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order; files that were made a moment ago count as old."""
    names: list[str] = []
    digest = known.digest_file
    monkeypatch.setattr(known, "digest_file", lambda path, *rest: names.append(path.name) or digest(path, *rest))
    monkeypatch.setattr(known, "_RACY_NS", 0)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BYTES)
    return path


def true_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once_and_known_by_every_path_to_it(file: Path, read: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    told: list[int] = []
    for path in (file, file, tmp_path / "link"):
        assert digest_known(path, told.append) == true_digest(file)
    assert read == [file.name]
    assert sum(told) == 3 * len(BYTES)  # a bar comes to its end in any case


def test_a_small_file_is_read_and_nothing_of_it_kept(tmp_path: Path, read: list[str], cache: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert digest_known(path) == digest_known(path) == true_digest(path)
    assert read == [path.name] * 2
    assert not cache.exists()


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"edited")


def overwrite_and_set_the_time_back(file: Path) -> None:
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another_of_the_same_time(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(BYTES[::-1])
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


def append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize(
    "edit", [overwrite, overwrite_and_set_the_time_back, replace_by_another_of_the_same_time, append]
)
def test_an_edit_is_always_noticed(edit: Callable[[Path], None], file: Path, read: list[str]) -> None:
    first = digest_known(file)
    time.sleep(0.02)  # a tick of the clock that files are dated by
    edit(file)
    assert first != digest_known(file) == true_digest(file)
    assert read == [file.name] * 2


def test_nothing_is_kept_of_a_file_that_was_just_written(file: Path, cache: Path) -> None:
    """Its next edit could fall into the same tick of the clock."""
    assert digest_known(file) == true_digest(file)
    assert not cache.exists()


def test_an_entry_that_was_damaged_is_none(file: Path, read: list[str], cache: Path) -> None:
    digest_known(file)
    (entry,) = (cache / "digests").iterdir()
    for number, text in enumerate(
        ("", "[]", "{", '{"sha256": "00"}', entry.read_text().replace('"size"', '"sizes"')), 2
    ):
        entry.write_text(text)
        assert digest_known(file) == true_digest(file)
        assert len(read) == number


def test_a_cache_that_cannot_be_written_means_reading_again(file: Path, read: list[str], cache: Path) -> None:
    cache.write_text("a file in its place")
    assert digest_known(file) == digest_known(file) == true_digest(file)
    assert read == [file.name] * 2


def count_read_bytes(*arguments: object) -> int:
    """What all reads of this process bring in while it does a command, of whatever file."""
    before = Path("/proc/self/io").read_text().split()[1]
    finished = dense2moe(*arguments)
    assert finished.exit_code == 0, finished.output
    return int(Path("/proc/self/io").read_text().split()[1]) - int(before)


@pytest.fixture
def large(make_dense: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A dense checkpoint of 20 MB, and a recipe for it."""
    source = make_dense(vocab_size=300, hidden_size=256, intermediate_size=3000)
    text, recipe = tmp_path / "text.txt", tmp_path / "large.yaml"
    text.write_text("".join(f"Document {number} tells of house {number % 7}.\n" for number in range(800)))
    data = f"{{source: {{kind: text, train: [{text}], separator: '.'}}, block_size: 32}}"
    recipe.write_text(f"source: {source}\ndata: {data}\n")
    return source, recipe


def test_a_second_look_at_a_source_does_not_read_it(large: tuple[Path, Path], read: list[str], tmp_path: Path) -> None:
    source, recipe = large
    size = (source / "model.safetensors").stat().st_size
    assert size > 19_000_000
    run = ("run", recipe, "--workdir", tmp_path / "work", "--until", "source")
    first = [count_read_bytes("check", recipe), count_read_bytes(*run)]
    assert min(first) > size  # the run looks at every value once
    assert read.count("model.safetensors") == 1  # and the two together make one digest of it
    again = [count_read_bytes("check", recipe), count_read_bytes("plan", recipe), count_read_bytes(*run)]
    assert max(again) < size / 4
    overwrite(source / "model.safetensors")
    assert count_read_bytes("check", recipe) > size


@pytest.fixture
def cached(large: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same as the hub's cache has it: the blob of the weights is named by their SHA-256."""
    source, recipe = large
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        name = true_digest(path) if path.suffix == ".safetensors" else hashlib.sha1(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    recipe.write_text(recipe.read_text().replace(str(source), str(snapshot)))
    return snapshot / "model.safetensors", recipe


def test_weights_in_the_hub_s_cache_are_known_by_their_blob_and_read_before_anything_is_made(
    cached: tuple[Path, Path], read: list[str], tmp_path: Path
) -> None:
    weights, recipe = cached
    assert find_claimed(weights) == true_digest(weights)
    assert find_claimed(weights.with_name("config.json")) is None
    count_read_bytes("check", recipe)
    assert weights.name not in read
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1
    weights.resolve().write_bytes(damaged)
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "work", "--until", "source")
    assert finished.exit_code == 1
    found, claimed = true_digest(weights), weights.resolve().name
    assert finished.stderr.splitlines()[-1] == (
        f"Error: {weights}: SHA-256 {found[:12]}...; must be {claimed[:12]}..., as the hub named it; delete "
        f"{weights.resolve()}, and a run fetches it again"
    )


def test_a_file_that_a_program_has_mapped_and_goes_on_changing_is_read_again(
    file: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives a changed page no new time until it is written."""
    monkeypatch.setattr(os, "fsync", posix.fsync)  # other tests wait for no disk
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = ord("x")
        digest_known(file)
        time.sleep(0.01)
        mapped[1] = ord("y")
        assert digest_known(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("given", ["relative/cache", ""])
def test_a_cache_home_that_is_no_absolute_path_is_ignored(
    given: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the XDG base directory specification says."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(known, "_RACY_NS", 0)
    monkeypatch.delenv("DENSE2MOE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    digest_known(file)
    assert not list(here.iterdir())
    assert len(list((tmp_path / "home" / ".cache" / "dense2moe" / "digests").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "named"))
    digest_known(file)
    assert len(list((tmp_path / "named" / "dense2moe" / "digests").iterdir())) == 1
