"""The floors: imports point down, and the table of stages reads only what stands above it."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dense2moe.convert.pipeline import PIPELINE, Input, Stage
from dense2moe.convert.stage_names import STAGE_NAMES

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


def test_the_stages_have_the_names_that_commands_know():
    assert tuple(stage.name for stage in PIPELINE) == STAGE_NAMES
    assert not any("-" in name for name in STAGE_NAMES)  # behind which a label has its item


@pytest.fixture(params=[None, object()], ids=["no fine-tuning", "fine-tuning"])
def preparation(request: pytest.FixtureRequest) -> SimpleNamespace:
    """As much of a preparation as decides which stage makes an input."""
    return SimpleNamespace(recipe=SimpleNamespace(finetune=request.param))


def reads(stage: Stage, preparation: SimpleNamespace) -> set[str]:
    return {read.find_stage(preparation) if isinstance(read, Input) else read for read in stage.reads}


def test_each_stage_reads_only_stages_above_it(preparation: SimpleNamespace):
    above: set[str] = set()
    for stage in PIPELINE:
        assert reads(stage, preparation) <= above, stage.name
        above.add(stage.name)


def test_a_stage_that_runs_once_gathers_or_reads_no_stage_of_one_variant(preparation: SimpleNamespace):
    each = {stage.name for stage in PIPELINE if stage.each}
    for stage in PIPELINE:
        if not stage.each and not stage.gathers:
            assert not each & reads(stage, preparation), stage.name
