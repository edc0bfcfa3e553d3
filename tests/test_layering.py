"""The floors: imports point down, and the table of stages reads only what stands above it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dense2moe.convert.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent


def test_imports_point_down(tmp_path: Path) -> None:
    command = shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    for folder in ("convert", "export", "upcycle"):  # as they lie once installed: import-linter reads one folder
        shutil.copytree(ROOT / folder, tmp_path / "dense2moe" / folder)
    for file in (ROOT / "dense2moe").glob("*.py"):
        shutil.copy(file, tmp_path / "dense2moe")
    arguments = [command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    finished = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


def test_each_stage_reads_only_stages_above_it():
    above: set[str] = set()
    for stage in PIPELINE:
        assert set(stage.reads) <= above, stage.name
        above.add(stage.name)


def test_a_stage_that_runs_once_reads_no_stage_of_one_variant():
    each = {stage.name for stage in PIPELINE if stage.each_variant}
    for stage in PIPELINE:
        if not stage.each_variant and stage.name != "report":
            assert not each & set(stage.reads), stage.name
