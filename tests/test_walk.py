"""The walk over a table of stages: here a small one of our own, with two sources, gathers and a second road."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dense2moe.convert import pipeline
from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.checking import prepare
from dense2moe.convert.pipeline import Input, Stage
from dense2moe.convert.planning import plan_artifacts
from dense2moe.convert.preparation import StageRun
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.recipe.loading import LoadedRecipe, load_recipe
from dense2moe.convert.walk import RunOutcome, run_pipeline


@dataclass(frozen=True)
class Words:
    """What each stage of this table finds."""

    words: tuple[str, ...]
    breaches: tuple[str, ...] = ()


def run_stage(run: StageRun) -> Words:
    """The words of all inputs in their order, or those of the source, and what this stage makes of them."""
    words = [word for facts in run.input_facts.values() for word in facts["words"]] or [f"words of {run.item}"]
    (run.output / "words.txt").write_text("\n".join(words))
    return Words(tuple(words), ("too short",) if run.item == "int8" else ())


def find_road(preparation: Any) -> str:
    return preparation.road


def settings(preparation: Any, item: str | None) -> dict[str, Any]:
    return {"item": item, "length": preparation.lengths.get(item, 0)}


def stage(name: str, *reads: str | Input, **options: Any) -> Stage:
    return Stage(name, reads, settings, run_stage, ("dense2moe.convert.stages",), light=True, **options)


MERGED_AND_ENSEMBLE = (
    stage("source", each="source"),
    stage("branch", "source", each="source"),
    stage("merge", "branch", gathers=True),
    stage("ensemble", "source", "merge", gathers=True),  # the second road
    stage("quantize", Input("exported", find_road), each="variant"),
    stage("onnx", "quantize", each="variant"),
    stage("report", "merge", "ensemble", "quantize", "onnx", gathers=True),
)


@pytest.fixture
def preparation(tmp_path: Path) -> SimpleNamespace:
    recipe = SimpleNamespace(seed=0)
    return SimpleNamespace(
        loaded=LoadedRecipe(recipe, "two", tmp_path / "two.yaml", ""),
        items={"source": ("code", "prose"), "variant": ("float32", "int8")},
        road="merge",
        lengths={},
        last_stage=None,
        artifact_bytes={},
        scratch_bytes={},
        memory_bytes={},
        remarks=(),
    )


def run(
    preparation: SimpleNamespace,
    workdir: Path,
    until: str = "report",
    stages: tuple[Stage, ...] = MERGED_AND_ENSEMBLE,
) -> RunOutcome:
    with ProgressDisplay() as display:
        outcome = run_pipeline(preparation, workdir, until, display, stages)
    assert outcome is not None
    return outcome


def test_a_table_holds_several_sources_gathers_and_a_second_road(preparation: SimpleNamespace, tmp_path: Path) -> None:
    outcome = run(preparation, tmp_path)
    assert list(outcome.artifacts) == [
        *("source-code", "branch-code", "source-prose", "branch-prose"),
        *("merge", "ensemble"),
        *("quantize-float32", "onnx-float32", "quantize-int8", "onnx-int8"),
        "report",
    ]
    words = {label: artifact.facts["words"] for label, artifact in outcome.artifacts.items()}
    assert words["branch-prose"] == ["words of prose"]
    assert words["merge"] == ["words of code", "words of prose"]
    assert words["ensemble"] == ["words of code", "words of prose", "words of code", "words of prose"]
    assert words["onnx-int8"] == words["quantize-float32"] == words["merge"]
    assert len(words["report"]) == 2 + 4 + 4 * 2
    assert list(outcome.artifacts["report"].manifest["inputs"]) == [
        *("merge", "ensemble", "quantize-float32", "onnx-float32", "quantize-int8", "onnx-int8")
    ]
    assert outcome.breaches == ("int8: too short", "int8: too short")  # of whichever stage


def test_only_what_reads_a_changed_item_is_made_anew(preparation: SimpleNamespace, tmp_path: Path) -> None:
    before = run(preparation, tmp_path).artifacts
    preparation.lengths["prose"] = 1
    after = run(preparation, tmp_path).artifacts
    same = {label for label in before if before[label].directory == after[label].directory}
    assert same == {"source-code", "branch-code"}


def test_what_another_version_of_the_code_made_is_told_in_one_line_and_made_anew(
    preparation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(preparation, tmp_path, "merge").artifacts
    monkeypatch.setattr("dense2moe.convert.planning.code_digest", lambda *_: "another version")
    capsys.readouterr()
    after = run(preparation, tmp_path, "merge").artifacts
    assert capsys.readouterr().err.splitlines()[0] == (
        f"! {tmp_path}: made by another version of dense2moe, kept as they are and made anew: source-code, "
        "branch-code, source-prose, branch-prose, merge"
    )
    assert not {artifact.directory for artifact in before.values()} & {a.directory for a in after.values()}
    assert all(artifact.directory.is_dir() for artifact in before.values())
    run(preparation, tmp_path, "merge")
    assert "another version" not in capsys.readouterr().err  # all is there


def test_another_setting_is_no_other_version(
    preparation: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(preparation, tmp_path, "merge")
    preparation.lengths["prose"] = 1
    run(preparation, tmp_path, "merge")
    assert "another version" not in capsys.readouterr().err


def test_an_input_may_be_made_by_another_stage_as_the_preparation_says(preparation: SimpleNamespace) -> None:
    for road in ("merge", "ensemble"):
        preparation.road = road
        planned = {each.label: each for each in plan_artifacts(preparation, "report", MERGED_AND_ENSEMBLE)}
        assert planned["quantize-int8"].inputs == {"exported": road}


def test_a_stage_that_does_not_gather_cannot_read_what_was_repeated(preparation: SimpleNamespace) -> None:
    with pytest.raises(AssertionError, match="merge: reads branch of each source and does not gather"):
        plan_artifacts(preparation, "merge", (*MERGED_AND_ENSEMBLE[:2], stage("merge", "branch")))


def test_a_walk_ends_where_it_is_told(preparation: SimpleNamespace, tmp_path: Path) -> None:
    assert list(run(preparation, tmp_path, "branch").artifacts) == [
        *("source-code", "branch-code", "source-prose", "branch-prose")
    ]


@pytest.fixture
def count_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where an upcycling was planned."""
    from dense2moe.convert import checking
    from dense2moe.upcycle.building import hidden_states, surgery

    found: list[str] = []
    plan = checking.plan_upcycle
    for module in (checking, hidden_states, surgery):
        name = module.__name__
        monkeypatch.setattr(module, "plan_upcycle", lambda *given, name=name: found.append(name) or plan(*given))
    return found


def test_a_launch_that_began_one_process_is_noted_where_there_is_work_to_share(
    preparation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preparation.remarks = ("a remark",)
    monkeypatch.setattr("dense2moe.convert.walk.explain_single_process", lambda: "one process")
    stages = tuple(replace(stage, all_processes=stage.name == "merge") for stage in MERGED_AND_ENSEMBLE)
    said = []
    for until in ("branch", "report", "report"):  # before it, at it, and when it is reused
        run(preparation, tmp_path, until, stages)
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("! ")])
    assert said == [["! a remark"], ["! a remark", "! one process"], ["! a remark"]]


def test_an_upcycling_is_planned_once(
    dense_checkpoint: Path, tmp_path: Path, count_plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes to the processes of stages as it is."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Document {number} tells of house {number % 7}." for number in range(800)))
    recipe = tmp_path / "once.yaml"
    recipe.write_text(
        f"source: {dense_checkpoint}\n"
        f"data: {{source: {{kind: text, train: [{text}], separator: '.'}}, block_size: 32}}\n"
        "upcycle: {num_experts: 4, router: {kind: kmeans}}\n"
    )

    def run_here(function: Any, argument: Any, *_: Any) -> Any:
        return SimpleNamespace(
            found=function(pickle.loads(pickle.dumps(argument)), lambda *_: None), peak_resident_bytes=0
        )

    monkeypatch.setattr("dense2moe.convert.walk.run_apart", run_here)
    preparation = prepare(load_recipe(recipe), lambda *_: None)
    with ProgressDisplay() as display:
        outcome = run_pipeline(preparation, tmp_path / "work", "upcycle", display, pipeline.PIPELINE)
    assert outcome is not None
    assert open_artifact(outcome.artifacts["upcycle"].directory).facts["router_text_tokens"]
    assert count_plans == ["dense2moe.convert.checking"]
