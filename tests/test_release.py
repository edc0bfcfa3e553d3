"""A package made ready to be given away deletes nothing of others, and is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import dense2moe
from test_card import made_workdir as make_once
from test_card import package as make_package
from test_card import workdir as make_workdir

made_workdir, package, workdir = make_once, make_package, make_workdir  # fixtures


def snapshot(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_folder_of_the_user_with_a_likely_name_stays(workdir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "letters.txt").write_text("mine", encoding="utf-8")
    assert dense2moe("package", workdir, tmp_path / "out").exit_code == 0
    assert (mine / "letters.txt").read_text(encoding="utf-8") == "mine"
    assert snapshot(tmp_path) >= {"out/SHA256SUMS", "out.partial/letters.txt"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "failing", ["shutil.copyfile", "os.fsync", "pathlib.Path.rename", "dense2moe.convert.release.write_digests"]
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupted"]
)
def test_a_failure_leaves_nothing_and_a_second_call_succeeds(
    failing: str, error: BaseException, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "deep" / "out"
    before = snapshot(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        finished = dense2moe("package", workdir, output)
    assert finished.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    if isinstance(error, OSError):
        assert finished.output == f"Error: {output}: the disk is full; free some space, or give another DIRECTORY\n"
    assert snapshot(tmp_path) == before
    assert dense2moe("package", workdir, output).exit_code == 0


def test_what_is_given_away_is_for_others_to_read_and_has_no_links(workdir: Path, tmp_path: Path) -> None:
    data = next(workdir.glob("onnx-*/model.onnx_data"))
    shutil.copy(data, tmp_path / "elsewhere")
    before = os.umask(0o027)
    try:
        assert dense2moe("package", workdir, tmp_path / "out").exit_code == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
    assert str(tmp_path) not in (tmp_path / "out" / "SHA256SUMS").read_text(encoding="utf-8")
