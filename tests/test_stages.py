"""Stages: what is known before any work, and sources on the hub."""

import hashlib

import pytest

from convert.errors import RecipeError
from convert.pipeline import plan_tasks
from convert.recipe import load_recipe
from convert.stages import data_settings, prepare

HUB = """\
source: {hub: nobody/tiny-llama, revision: abc123}
data:
  source: {kind: python-docs}
  block_size: 32
"""


@pytest.fixture
def hub_recipe(tmp_path):
    path = tmp_path / "hub.yaml"
    path.write_text(HUB, encoding="utf-8")
    return load_recipe(path)


def test_a_hub_source_is_fetched_at_its_revision_without_pickles(hub_recipe, dense_checkpoint, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        return str(dense_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    preparation = prepare(hub_recipe, lambda *_: None)
    assert (asked["repo_id"], asked["revision"]) == ("nobody/tiny-llama", "abc123")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in asked["allow_patterns"])
    assert preparation.origin == "nobody/tiny-llama@abc123"
    assert preparation.checkpoint.directory == dense_checkpoint


def test_a_hub_that_cannot_be_reached_is_one_line(hub_recipe, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(RecipeError) as caught:
        prepare(hub_recipe, lambda *_: None)
    assert str(caught.value) == (
        "source: nobody/tiny-llama at revision 'abc123' cannot be fetched from the hub (ConnectionError: no route to host); "
        "check the id, or give a path"
    )


def test_the_files_of_every_domain_are_digested_under_its_place(tmp_path, dense_checkpoint):
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 50, encoding="utf-8")
    path = tmp_path / "domains.yaml"
    path.write_text(
        f"source: {dense_checkpoint}\ndata:\n  block_size: 32\n  source:\n    kind: domains\n    domains:\n"
        "      one: {kind: text, train: [a.txt], test: [held.txt]}\n      two: {kind: text, train: [b.txt]}\n",
        encoding="utf-8",
    )

    def prepared():
        return prepare(load_recipe(path), lambda *_: None)

    first = prepared()
    places = {"one.train": "a", "one.test": "held", "two.train": "b"}
    assert first.data_files == {
        f"data.source.domains.{place}/{tmp_path / name}.txt": hashlib.sha256((tmp_path / f"{name}.txt").read_bytes()).hexdigest()
        for place, name in places.items()
    }
    assert data_settings(prepared(), None) == data_settings(first, None)
    (tmp_path / "b.txt").write_text("another text", encoding="utf-8")
    assert data_settings(prepared(), None) != data_settings(first, None)


@pytest.mark.parametrize("pattern", ["t.txt", "t*.txt", "[t]*.txt"])
def test_text_beside_a_recipe_in_a_folder_with_brackets_is_found(pattern, tmp_path, dense_checkpoint, monkeypatch):
    folder = tmp_path / "dir [v2]"
    folder.mkdir()
    (folder / "t.txt").write_text("some text", encoding="utf-8")
    path = folder / "r.yaml"
    path.write_text(f"source: {dense_checkpoint}\ndata: {{source: {{kind: text, train: ['{pattern}']}}, block_size: 32}}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert list(prepare(load_recipe(path), lambda *_: None).data_files) == [f"data.source.train/{folder / 't.txt'}"]


def test_fine_tuning_is_switched_off_by_null_alone(tmp_path, dense_checkpoint):
    def load(finetune):
        path = tmp_path / "off.yaml"
        path.write_text(
            f"source: {dense_checkpoint}\ndata: {{source: {{kind: python-docs}}, block_size: 32}}\nfinetune: {finetune}\n", encoding="utf-8"
        )
        return load_recipe(path)

    preparation = prepare(load("null"), lambda *_: None)
    assert preparation.scratch_bytes == 0
    assert "finetune" not in preparation.artifact_bytes
    tasks = {task.label: task for task in plan_tasks(preparation, "report")}
    assert "finetune" in tasks
    assert {name for name, task in tasks.items() if "finetune" in task.inputs.values()} == {"report"}
    for name in ("quantize-int8", "parity-int8"):
        assert tasks[name].inputs["finetune"] == "upcycle"
    with pytest.raises(RecipeError, match=r"finetune\.steps: is 0; must be greater than 0, or `finetune: null`, which switches fine-tuning off"):
        load("{steps: 0}")
    assert load("{max_grad_norm: null}").recipe.finetune.max_grad_norm is None


def test_a_block_longer_than_the_context_is_refused(tmp_path, dense_checkpoint):
    path = tmp_path / "long.yaml"
    path.write_text(f"source: {dense_checkpoint}\ndata: {{source: {{kind: python-docs}}, block_size: 1024}}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(path), lambda *_: None)
    assert str(caught.value) == f"{path}: data.block_size: is 1024; must be at most the model's context, which is 256"
