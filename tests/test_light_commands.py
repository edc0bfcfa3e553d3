"""Commands that compute nothing answer at once: they import neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_facts import make_facts

from dense2moe.convert.artifact.keys import artifact_key
from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.run_state import RunState, write_run

HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "numpy", "matplotlib")

CODE = """
import json, sys
from click.testing import CliRunner
from dense2moe.convert.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    finished = CliRunner().invoke(main, arguments, prog_name="dense2moe")
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found.append([finished.exit_code, heavy, finished.output])
print(json.dumps(found))
"""


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """As much of a finished run as commands read: its state, and its report."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    with build(workdir, "report", artifact_key({}, {}, "")) as draft:
        (draft.directory / "report.html").write_text("page")
        sealed = draft.seal(inputs={}, settings={}, facts=make_facts(), versions={}, seed=0)
    write_run(workdir, RunState("tiny", "tiny.yaml", "finished", {"report": sealed.directory.name}))
    return workdir


def test_commands_that_only_read_import_nothing_heavy(workdir: Path, tmp_path: Path) -> None:
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("source: dense\ndata: {source: {kind: python-docs}}\nupcycle: {topk: 2}\n")
    expected = {
        ("--help",): (0, "Commands:"),
        ("show", str(workdir)): (0, "tiny: finished"),
        ("verify", str(workdir)): (0, "1 artifact, every file as its manifest says"),
        ("compare", str(workdir), str(workdir)): (0, "perplexity"),
        ("schema",): (0, "Recipe of dense2moe"),
        ("schema", "--report"): (0, "Report of dense2moe"),
        ("check", str(misspelt)): (1, "did you mean 'num_experts_per_tok'?"),
        ("package", str(workdir), str(tmp_path / "out")): (1, "no ONNX package yet"),
    }
    command = [sys.executable, "-c", CODE, json.dumps(list(expected)), json.dumps(HEAVY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    for arguments, (code, heavy, output) in zip(expected, json.loads(finished.stdout), strict=True):
        assert heavy == [], arguments
        assert code == expected[arguments][0], output
        assert expected[arguments][1] in output


def test_records_of_a_recipe_and_errors_need_no_torch() -> None:
    """The settings of all floors, which a recipe composes, and the errors that a command catches by their types."""
    modules = ("convert.recipe.loading", "convert.report.facts", "convert.errors", "upcycle.errors", "export.errors")
    code = "".join(f"import dense2moe.{name}\n" for name in modules)
    code += f"import sys; print([name for name in {HEAVY[:4]} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
