"""Stages: what is known before any work, and sources on the hub."""

import errno
import hashlib
import shutil
from fnmatch import fnmatchcase

import pytest

from dense2moe.convert.checking import prepare
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.planning import plan_artifacts
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.stages.data import list_settings
from dense2moe.upcycle.errors import UpcycleError

DOCUMENTS = "|".join(f"Document {number} tells of house {number % 7} and its garden." for number in range(200))
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


def test_a_hub_source_is_fetched_at_its_revision_without_pickles(hub_recipe, make_dense, tmp_path, monkeypatch):
    """First what belongs to the model, then the weights of the same commit that its index names, and nothing else."""
    commit = tmp_path / "0a1b2c"
    fetched = []

    def snapshot_download(repo_id, revision, ignore_patterns=(), allow_patterns=("*",)):
        assert (repo_id, revision) == ("nobody/tiny-llama", "abc123" if not fetched else commit.name)
        chosen = {
            name
            for name in in_the_repository
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns)
            and not any(fnmatchcase(name, pattern) for pattern in ignore_patterns)
        }
        for name in chosen:
            (commit / name).parent.mkdir(parents=True, exist_ok=True)
            (commit / name).write_bytes(in_the_repository[name])
        fetched.append(chosen)
        return str(commit)

    in_the_repository = {path.name: path.read_bytes() for path in make_dense(max_shard_size="20KB").iterdir()}
    own = set(in_the_repository)
    shards = {name for name in own if name.endswith(".safetensors")}
    assert len(shards) > 1
    other = (
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "fp8/model.safetensors",
        "pytorch_model.bin",
        "run.py",
        "onnx/model.onnx",
        "model.fp16.safetensors",
    )
    in_the_repository |= dict.fromkeys(
        (*other, "LICENSE", "README.md", "additional_chat_templates/tools.jinja"), b"text"
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    preparation = prepare(hub_recipe, lambda *_: None)
    assert fetched == [own - shards | {"LICENSE", "README.md"}, shards | {"additional_chat_templates/tools.jinja"}]
    assert preparation.origin == "nobody/tiny-llama@abc123"
    assert preparation.checkpoint.directory == commit
    assert set(preparation.source_files) == own | {"LICENSE", "additional_chat_templates/tools.jinja"}


def test_no_weights_are_fetched_of_a_family_that_cannot_be_upcycled(hub_recipe, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}')

    def snapshot_download(*_, allow_patterns=None, **__):
        assert allow_patterns is None
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UpcycleError, match="BitNetForCausalLM"):
        prepare(hub_recipe, lambda *_: None)


def test_a_moved_folder_with_its_recipe_has_the_same_keys(tmp_path, dense_checkpoint):
    home, moved = tmp_path / "home", tmp_path / "elsewhere" / "moved"
    home.mkdir()
    moved.parent.mkdir()
    shutil.copytree(dense_checkpoint, home / "dense")
    (home / "t.txt").write_text(DOCUMENTS, encoding="utf-8")
    (home / "moved.yaml").write_text(
        "source: dense\ndata: {source: {kind: text, train: [t*.txt], separator: '|'}, block_size: 32}\n"
        "upcycle: {num_experts: 4, router: {kind: prototypes, domains: [{files: [t.txt]}, {prompts: [a b]}, "
        "{prompts: [c]}, {prompts: [d]}]}}\n",
        encoding="utf-8",
    )

    def list_keys(folder, source=None):
        if source is not None:
            path = folder / "moved.yaml"
            path.write_text(path.read_text().replace("source: dense", f"source: {source}", 1))
        preparation = prepare(load_recipe(folder / "moved.yaml"), lambda *_: None)
        return {each.label: each.key for each in plan_artifacts(preparation, "report")}

    before = list_keys(home)
    home.rename(moved)
    assert list_keys(moved) == before
    assert list_keys(moved, moved / "dense")["source"] != before["source"]  # as links to elsewhere are


class RevisionNotFoundError(Exception):
    """As huggingface_hub names it."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectionError(errno.EHOSTUNREACH, "No route to host"),
            "is not in the cache, and the hub cannot be reached (No route to host); mend the network",
        ),
        (RevisionNotFoundError("404 " * 100), "has no such revision; give a commit, tag or branch that it has"),
        (ValueError("no\nway"), "cannot be loaded (ValueError: no way); mend that"),
    ],
)
def test_a_model_that_cannot_be_fetched_is_one_clear_line(error, told, hub_recipe, monkeypatch):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(RecipeError) as caught:
        prepare(hub_recipe, lambda *_: None)
    assert str(caught.value) == (
        f"{hub_recipe.path}:1: source.hub: 'nobody/tiny-llama' at revision 'abc123' {told}, or give a directory as path"
    )


def test_the_files_of_every_domain_are_digested_under_its_place(tmp_path, dense_checkpoint):
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {DOCUMENTS}", encoding="utf-8")
    path = tmp_path / "domains.yaml"
    path.write_text(
        f"source: {dense_checkpoint}\ndata:\n  block_size: 32\n  source:\n    kind: domains\n    domains:\n"
        "      one: {kind: text, train: [a.txt], test: [held.txt], separator: '|'}\n      two: {kind: text, train: "
        "[b.txt], separator: '|'}\n",
        encoding="utf-8",
    )

    def prepared():
        return prepare(load_recipe(path), lambda *_: None)

    first = prepared()
    places = {"one.train": "a", "one.test": "held", "two.train": "b"}
    assert first.data_files == {
        f"data.source.domains.{place}/{name}.txt": hashlib.sha256((tmp_path / f"{name}.txt").read_bytes()).hexdigest()
        for place, name in places.items()
    }
    assert list_settings(prepared(), None) == list_settings(first, None)
    (tmp_path / "b.txt").write_text(f"another {DOCUMENTS}", encoding="utf-8")
    assert list_settings(prepared(), None) != list_settings(first, None)


@pytest.mark.parametrize("pattern", ["t.txt", "t*.txt", "[t]*.txt"])
def test_text_beside_a_recipe_in_a_folder_with_brackets_is_found(pattern, tmp_path, dense_checkpoint, monkeypatch):
    folder = tmp_path / "dir [v2]"
    folder.mkdir()
    (folder / "t.txt").write_text(DOCUMENTS, encoding="utf-8")
    path = folder / "r.yaml"
    path.write_text(
        f"source: {dense_checkpoint}\ndata: {{source: {{kind: text, train: ['{pattern}'], separator: '|'}}, "
        "block_size: 32}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    assert list(prepare(load_recipe(path), lambda *_: None).data_files) == ["data.source.train/t.txt"]


def test_fine_tuning_is_switched_off_by_null_alone(tmp_path, dense_checkpoint):
    def load(finetune):
        path = tmp_path / "off.yaml"
        path.write_text(
            f"source: {dense_checkpoint}\ndata: {{source: {{kind: python-docs}}, block_size: 32}}\nfinetune: "
            f"{finetune}\n",
            encoding="utf-8",
        )
        return load_recipe(path)

    preparation = prepare(load("null"), lambda *_: None)
    assert preparation.scratch_bytes == {}
    assert "finetune" not in preparation.artifact_bytes
    tasks = {task.label: task for task in plan_artifacts(preparation, "report")}
    assert "finetune" in tasks
    assert {name for name, task in tasks.items() if "finetune" in task.inputs.values()} == {"report"}
    for name in ("quantize-int8", "parity-int8"):
        assert tasks[name].inputs["exported"] == "upcycle"
    with pytest.raises(
        RecipeError,
        match=r"finetune\.steps: is 0; must be greater than 0, or `finetune: null`, which switches fine-tuning off",
    ):
        load("{steps: 0}")
    assert load("{max_grad_norm: null}").recipe.finetune.max_grad_norm is None


def test_a_block_longer_than_the_context_is_refused(tmp_path, dense_checkpoint):
    path = tmp_path / "long.yaml"
    path.write_text(
        f"source: {dense_checkpoint}\ndata: {{source: {{kind: python-docs}}, block_size: 1024}}\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(path), lambda *_: None)
    assert str(caught.value) == f"{path}:2: data.block_size: is 1024; must be at most the model's context, which is 256"


def test_heads_that_8_does_not_divide_go_through(tmp_path, make_dense):
    """OpenLLaMA 3B has heads of 100."""
    source = make_dense(hidden_size=40, num_attention_heads=2, num_key_value_heads=1)
    path = tmp_path / "heads.yaml"
    path.write_text(f"source: {source}\ndata: {{source: {{kind: python-docs}}, block_size: 32}}\n", encoding="utf-8")
    preparation = prepare(load_recipe(path), lambda *_: None)
    assert preparation.last_stage is None
    assert set(preparation.lowerings) == set(preparation.recipe.variants)


def test_a_source_that_may_be_an_id_of_the_hub_is_told_how_to_write_one(tmp_path):
    path = tmp_path / "hub.yaml"
    path.write_text("source: nobody/tiny-llama\ndata: {source: {kind: python-docs}}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(path), lambda *_: None)
    assert str(caught.value).endswith(
        "; correct the path, or write `source: {hub: nobody/tiny-llama}` for a model of the Hugging Face hub"
    )


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_generation_config_that_transformers_refuses_is_told(text, tmp_path, dense_checkpoint):
    source = shutil.copytree(dense_checkpoint, tmp_path / "dense")
    (source / "generation_config.json").write_text(text)
    path = tmp_path / "r.yaml"
    path.write_text(f"source: {source}\ndata: {{source: {{kind: python-docs}}, block_size: 32}}\n", encoding="utf-8")
    with pytest.raises(UpcycleError) as caught:
        prepare(load_recipe(path), lambda *_: None)
    assert str(caught.value).startswith(
        f"{source / 'generation_config.json'}: transformers cannot read these settings for generation ("
    )
