"""Two runs side by side.

Only what differs of the recipes, every figure with its ratio, and what makes them incomparable.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from programs import dense2moe
from report_facts import classified, make_facts, records
from told import tells

from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.report.comparison import compare_runs
from dense2moe.convert.report.facts import read_facts

RECIPE = """\
source: models/a
data: {source: {kind: python-docs}, block_size: 256}
finetune: {steps: 80, control: true}
"""


@pytest.fixture
def runs() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs; the second has other experts, no int4, an int8 of half the size that failed."""
    first = make_facts() | {"recipe": RECIPE}
    second = copy.deepcopy(first)
    second["recipe"] = RECIPE.replace("steps: 80", "steps: 60") + "upcycle: {num_experts: 6}\nseed: 0\n"
    del second["variants"]["int4"]
    second["variants"]["int8"]["onnx"]["package_bytes"] //= 2
    second["variants"]["int8"]["parity"].update(passed=False, breaches=["CPUExecutionProvider: language: KL"])
    return first, second


def test_of_the_recipes_only_what_differs_is_told_and_a_default_that_is_written_is_no_difference(runs) -> None:
    rows = compare_runs(*map(records, runs), ("a", "b")).recipes.rows
    assert set(rows) == {("finetune.steps", "80", "60"), ("upcycle.num_experts", "8", "6")}


def test_a_recipe_of_another_version_is_compared_as_it_was_written(runs) -> None:
    runs[0]["recipe"] = "source: models/a\nfinetune: {forgotten_key: 3}\n"
    runs[1]["recipe"] = "source: models/a\nfinetune: {forgotten_key: 4, other: [1, 2]}\n"
    rows = compare_runs(*map(records, runs), ("a", "b")).recipes.rows
    assert rows == (("finetune.forgotten_key", "3", "4"), ("finetune.other", "—", "[1, 2]"))


def test_every_figure_has_its_ratio(runs) -> None:
    runs[1]["finetune"]["evaluations"]["dense"]["decode_tokens_per_second"] = 420.0
    rows = compare_runs(*map(records, runs), ("a", "b")).figures.rows
    assert rows[:3] == (
        ("dense", "perplexity", "14.88", "14.88", "1.0000 ×"),
        ("", "size", "8.26 MB", "8.26 MB", "1.0000 ×"),
        ("", "decode tokens/s", "210", "420", "2.00 ×"),
    )
    place = next(n for n, row in enumerate(rows) if row[0] == "ONNX int8")
    assert rows[place + 1] == ("", "size", "12.3 MB", "6.15 MB", "0.50 ×")
    place = next(n for n, row in enumerate(rows) if row[0] == "ONNX int4")
    assert rows[place] == ("ONNX int4", "perplexity", "11.51", "—", "—")


def test_the_verdicts_of_parity_are_side_by_side(runs) -> None:
    assert compare_runs(*map(records, runs), ("a", "b")).parity.rows == (
        ("ONNX float32", "passed", "passed"),
        ("ONNX int8", "passed", "FAILED: CPUExecutionProvider: language: KL"),
        ("ONNX int4", "passed", "—"),
    )


def test_what_makes_two_runs_incomparable_is_said(runs) -> None:
    assert compare_runs(*map(records, runs), ("a", "b")).notes == ()
    runs[1]["machine"]["cores"] = 64
    runs[1]["data"]["digest"] = "sha256:0"
    runs[1]["versions"]["torch"] = "9.9"
    notes = compare_runs(*map(records, runs), ("a", "b")).notes
    assert len(notes) == 3
    assert "held-out text differs" in notes[0]
    assert "x86_64, 2 cores and x86_64, 64 cores" in notes[1]
    assert notes[2] == "Versions differ: torch 2.10.0 and 9.9."


def write_run(workdir: Path, facts: dict[str, Any] | None) -> Path:
    workdir.mkdir()
    artifacts = {}
    if facts is not None:
        with build(workdir, "report", "1" * 64) as draft:
            artifacts["report"] = draft.seal(inputs={}, settings={}, facts=facts, versions={}, seed=0).directory.name
    state = {"name": workdir.name, "status": "finished", "recipe": "x.yaml", "artifacts": artifacts}
    (workdir / "run.json").write_text(json.dumps(state), encoding="utf-8")
    return workdir


def invoke(*arguments: object) -> tuple[int, str]:
    result = dense2moe(*arguments)
    return result.exit_code, result.output


def test_the_command_prints_tables_and_writes_a_page(runs, tmp_path) -> None:
    runs[0]["recipe"] += "# <script>\n"
    first, second = (write_run(tmp_path / name, facts) for name, facts in zip(("first", "second"), runs, strict=True))
    code, output = invoke("compare", first, second, "--html", tmp_path / "page.html")
    assert code == 0, output
    assert max(map(len, output.splitlines()[:-1])) <= 100
    for word in ("upcycle.num_experts", "1.0000 ×", "FAILED: CPUExecutionProvider"):
        assert word in output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>first and second</h1>" in page
    assert "upcycle.num_experts" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    code, output = invoke("compare", first, second, "--html", tmp_path / "none" / "page.html")
    assert code == 1
    assert tells(output.splitlines()[-1], tmp_path / "none" / "page.html", "is no directory", "another --html")


def test_a_run_without_a_report_is_one_line(runs, tmp_path) -> None:
    first, second = write_run(tmp_path / "first", runs[0]), write_run(tmp_path / "second", None)
    assert invoke("compare", first, second) == (
        1,
        f"Error: {second}: the run has no report yet; finish it with `dense2moe run`\n",
    )


def test_what_packages_score_is_compared_task_by_task(runs) -> None:
    for facts, accuracy in zip(runs, (0.5, 0.6), strict=True):
        scores = {"accuracy": accuracy, "macro F1": 0.1}
        task = {
            "name": "intents",
            "kind": "choice",
            "num_examples": 100,
            "metric": "accuracy",
            **dict.fromkeys(("package", "twin", "finetuned"), scores),
            "change": 0.0,
            "standard_error": 0.0,
            "same_as_twin": 1.0,
            "same_as_finetuned": 1.0,
            "largest_gap": 0.0,
        }
        facts["variants"]["int8"]["parity"]["providers"]["CPUExecutionProvider"]["tasks"] = [
            task,
            "not run: 'pairs' compares hidden states",
        ]
    rows = compare_runs(*map(records, runs), ("a", "b")).figures.rows
    place = next(n for n, row in enumerate(rows) if row[0] == "ONNX int4")
    assert rows[place - 1] == ("", "intents: accuracy", "0.500", "0.600", "1.20 ×")
    assert sum("intents" in row[1] for row in rows) == 1


def test_two_classifiers_are_compared_by_their_own_figure(runs) -> None:
    first, second = (records(classified(facts)) for facts in runs)
    rows = compare_runs(first, second, ("a", "b")).figures.rows
    assert rows[0] == ("dense", "F1", "0.2560", "0.2560", "1.0000 ×")
    assert not any("perplexity" in row for row in rows)


def test_figures_of_other_names_are_not_set_side_by_side(runs) -> None:
    rows = compare_runs(records(runs[0]), records(classified(runs[1])), ("a", "b")).figures.rows
    assert rows[:2] == (("dense", "perplexity", "14.88", "—", "—"), ("", "F1", "—", "0.2560", "—"))


@pytest.mark.parametrize("command", ["compare", "show"])
def test_a_report_of_older_code_is_one_line(runs, tmp_path, command) -> None:
    del runs[1]["finetune"]["evaluations"]["dense"]["figures"], runs[1]["upcycle"]["receipt"]
    first, second = (write_run(tmp_path / name, facts) for name, facts in zip(("first", "second"), runs, strict=True))
    code, said = invoke(command, *([first, second] if command == "compare" else [second]))
    assert code == 1
    assert said == (  # and nothing before it
        f"Error: {second}: its report has no upcycle.receipt and 1 more that this version can read: it was written by "
        "another version of dense2moe; run its recipe again\n"
    )
    runs[1]["upcycle"]["receipt"] = []
    with pytest.raises(ArtifactError, match=r"^b: its report has no finetune\.evaluations\.dense\.figures that"):
        read_facts(runs[1], "b")
    runs[1]["finetune"]["evaluations"]["dense"]["figures"] = runs[0]["finetune"]["evaluations"]["dense"]["figures"]
    del runs[1]["variants"]["int8"]["parity"]["providers"]["CPUExecutionProvider"]["twin"]["kl"]
    with pytest.raises(
        ArtifactError, match=r"has no variants\.int8\.parity\.providers\.CPUExecutionProvider\.twin\.kl that"
    ):
        read_facts(runs[1], "b")
