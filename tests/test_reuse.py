"""What an earlier run made is checked before a stage reads it, and left alone where nothing is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import dense2moe, stages_here

from dense2moe.convert.artifact import verification
from dense2moe.convert.artifact.keys import artifact_key
from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.artifact.sealing import build
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.pipeline import PIPELINE
from dense2moe.convert.planning import PlannedArtifact
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.walk import Walk

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(dense_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    finetune = {"steps": 2, "eval_steps": 1, "warmup_steps": 1, "batch_size": 4, "control": False}
    data = {
        "source": {"kind": "text", "train": [str(ROOT / "upcycle" / "*" / "*.py")], "separator": "\n\n"},
        "block_size": 32,
        "max_train_tokens": 4096,
        "max_validation_tokens": 1024,
        "max_test_tokens": 1024,
    }
    path.write_text(
        json.dumps({"source": str(dense_checkpoint), "data": data, "upcycle": {"num_experts": 4}, "finetune": finetune})
    )
    return path


def run(recipe: Path, until: str) -> str:
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", recipe.parent / "work", "--until", until)
    return str(finished.stderr)


def find(recipe: Path, label: str) -> Path:
    (directory,) = (path for path in (recipe.parent / "work").glob(f"{label}-*") if path.suffix == "")
    return directory


def change(file: Path) -> None:
    """Forty bytes near the end, as a bad disk or a hand leaves them: the size and the header stay."""
    content = bytearray(file.read_bytes())
    content[-400:-360] = bytes(byte ^ 1 for byte in content[-400:-360])
    file.write_bytes(content)


def test_a_stage_does_not_read_weights_that_were_changed(recipe: Path) -> None:
    run(recipe, "upcycle")
    mixture = find(recipe, "upcycle")
    change(mixture / "model.safetensors")
    sealed = open_artifact(mixture).manifest["files"]["model.safetensors"]["sha256"]
    assert "upcycle  reused" in run(recipe, "upcycle")  # nothing is made of it
    said = run(recipe, "finetune")
    line = said.splitlines()[-1]
    assert line.startswith(f"Error: {mixture}: model.safetensors: SHA-256 ")
    assert line.endswith(f"...; must be {sealed[:12]}...; move the directory away, and it will be made again")
    assert not list((recipe.parent / "work").glob("finetune-*"))
    assert json.loads((recipe.parent / "work" / "run.json").read_text())["status"] == "stopped"
    mixture.rename(recipe.parent / "bad")  # as the line says
    assert "✓ finetune" in run(recipe, "finetune")
    assert open_artifact(find(recipe, "upcycle")).manifest["files"]["model.safetensors"]["sha256"] == sealed


def test_facts_that_were_edited_stop_a_run(recipe: Path) -> None:
    run(recipe, "upcycle")
    path = find(recipe, "data") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["edited"] = True
    path.write_text(json.dumps(manifest))
    assert f"Error: {path}: was changed after it was sealed: SHA-256 of its content " in run(recipe, "upcycle")
    finished = dense2moe("verify", recipe.parent / "work")
    assert finished.exit_code == 1
    assert finished.stderr.startswith(f"Error: {path.parent}: manifest.json: was changed after it was sealed")


def test_each_artifact_is_read_once_a_run_and_none_that_this_run_made(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int | None]] = []
    check = verification.check_files
    monkeypatch.setattr(
        "dense2moe.convert.walk.check_files",
        lambda artifact, progress, largest: (
            read.append((artifact.manifest["label"], largest)),
            check(artifact, progress, largest),
        ),
    )
    run(recipe, "upcycle")
    assert read == []
    run(recipe, "upcycle")
    assert read == []
    find(recipe, "upcycle").rename(recipe.parent / "away")
    run(recipe, "finetune")
    assert read == [("source", None), ("data", None)]


def test_the_report_checks_what_it_reads_and_leaves_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made anew whenever its own code changes.

    And reads histories and configs of models that take minutes to hash.
    """
    assert [stage.name for stage in PIPELINE if stage.light] == ["source", "report"]
    monkeypatch.setattr("dense2moe.convert.walk._SMALL_BYTES", 100)
    key = artifact_key({}, {}, "")
    with build(tmp_path, "finetune", key) as draft:
        (draft.directory / "model.safetensors").write_bytes(bytes(1000))
        (draft.directory / "history.jsonl").write_bytes(bytes(100))
        made = draft.seal(inputs={}, settings={}, facts={}, versions={}, seed=0)
    change(made.directory / "model.safetensors")
    report, quantize = (
        PlannedArtifact(
            next(stage for stage in PIPELINE if stage.name == name), None, {"finetune": "finetune"}, {}, {}, key
        )
        for name in ("report", "quantize")
    )
    walk = Walk(None, tmp_path, [], ProgressDisplay(), -1)
    walk.artifacts["finetune"] = made
    walk.check_inputs(report, lambda *_: None)
    assert walk.hashed == set()  # not all of it was read
    with pytest.raises(ArtifactError, match=r"model\.safetensors: SHA-256"):
        walk.check_inputs(quantize, lambda *_: None)
    (made.directory / "history.jsonl").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match=r"history\.jsonl: SHA-256"):
        walk.check_inputs(report, lambda *_: None)
