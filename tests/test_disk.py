"""What the file system refuses is one line, and a run that cannot end does not begin."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dense2moe.convert.artifact.disk import check_space, describe_os_error
from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.artifact.verification import verify
from dense2moe.convert.errors import ArtifactError


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "w: the disk is full; free some space, or give another --workdir"),
        (errno.EDQUOT, "w: your disk quota is used up; free some space, or give another --workdir"),
        (
            errno.EACCES,
            "w: no permission; must be yours to read and write; change its owner or mode, or give another --workdir",
        ),
        (
            errno.EPERM,
            "w: no permission; must be yours to read and write; change its owner or mode, or give another --workdir",
        ),
        (errno.EROFS, "w: no write permission: the file system is read-only; give another --workdir"),
        (errno.ENOTDIR, "w: a file is in the way; must be a directory; move it away, or give another --workdir"),
        (
            errno.EIO,
            "w: the disk fails (Input/output error); look at the disk, or give another --workdir, and run again",
        ),
    ],
)
def test_an_error_of_the_system_is_one_line(number: int, line: str) -> None:
    assert describe_os_error(OSError(number, os.strerror(number)), Path("w")) == line
    assert describe_os_error(OSError(number, os.strerror(number), "w/model"), Path("w")) == line.replace(
        "w:", "w/model:", 1
    )


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EFBIG, "a file grew past the largest size allowed; raise the limit (ulimit -f)"),
        (errno.EACCES, "no permission; must be yours to read and write; change its owner or mode"),
        (errno.EROFS, "no write permission: the file system is read-only; mount it for writing"),
        (errno.EIO, "the disk fails (Input/output error); look at the disk, and run again"),
        (errno.ENAMETOOLONG, "the name is too long; give a shorter name"),
    ],
)
def test_another_directory_is_advised_for_what_is_in_it_alone(number: int, line: str) -> None:
    assert describe_os_error(OSError(number, os.strerror(number), "/s/model/config.json"), Path("w")) == (
        f"/s/model/config.json: {line}"
    )
    draft = OSError(errno.ENOSPC, "full", "/s/.model-0123.partial/model.onnx")
    assert describe_os_error(draft, Path("/s/model"), "DIRECTORY").endswith("or give another DIRECTORY")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_what_is_only_read_is_mended_where_it_is(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another --workdir would help against nothing."""
    path = tmp_path / "manifest.json"
    path.touch()

    def refuse(place: Path) -> bytes:  # root may read everything
        raise OSError(number, os.strerror(number), str(place))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (open_artifact, verify):
        with pytest.raises(ArtifactError) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "change its owner or mode" in str(caught.value) or "look at the disk" in str(caught.value)
        assert "workdir" not in str(caught.value) and "write" not in str(caught.value)


def test_an_error_without_a_number_is_one_line_too() -> None:
    line = "w: two lines; mend that, or give another --workdir, and run again"
    assert describe_os_error(OSError("two\nlines"), Path("w")) == line


def test_too_little_space_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> Any:
        assert path == tmp_path  # the nearest that exists
        return shutil._ntuple_diskusage(10_000_000, 0, 2_500_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "a" / "b", 2_500_000)
    with pytest.raises(ArtifactError) as caught:
        check_space(tmp_path / "a" / "b", 3_000_000_000)
    assert (
        str(caught.value)
        == f"{tmp_path / 'a' / 'b'}: 2.5 MB free on this disk; 3.0 GB needed; free some space, or give another "
        "--workdir"
    )
