"""A directory is read as plain transformers reads it.

And what would make it another model there is refused or followed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.convert.cli import main
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.plan import plan_upcycle
from dense2moe.upcycle.checkpoints.loading import load_whole
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# peft asks transformers for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MakeDense = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(2, 20)[None]


@pytest.fixture
def folder(dense_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "folder"))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(directory: Path) -> torch.Tensor:
    """As anybody's transformers gives them."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits  # type: ignore[no-any-return]


# Tied embeddings


HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "equal": lambda table: table.clone(),
    "in another order": lambda table: table.flip(0).contiguous(),
    "one number off by its last bit": lambda table: table.index_put(
        (torch.tensor(299), torch.tensor(31)), torch.nextafter(table[299, 31], torch.tensor(9.0))
    ),
    "zero": torch.zeros_like,
    "rounded": lambda table: table.to(torch.bfloat16),
    "equal in another dtype": lambda table: table.to(torch.float64),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_stored_head_is_tied_where_transformers_ties_it(kind: str, folder: Path) -> None:
    rewrite(folder, lambda state: state.update({HEAD: HEADS[kind](state[EMBEDDING])}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("equal" in kind)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings == tied
    assert checkpoint.untied == (() if tied else (HEAD,))


def test_the_larger_matrices_are_compared_to_their_last_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.tensors.CHUNK_ELEMENTS", 7 * 32)  # 300 rows in pieces of seven
    rewrite(folder, lambda state: state.update({HEAD: HEADS["one number off by its last bit"](state[EMBEDDING])}))
    assert open_checkpoint(folder).untied == (HEAD,)
    rewrite(folder, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    assert open_checkpoint(folder).untied == ()


def test_no_weight_is_read_where_no_copy_is_stored(
    folder: Path, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.tensors._read", lambda *_: pytest.fail("a weight was read"))
    assert open_checkpoint(folder).untied == ()
    assert open_checkpoint(make_dense(tie_word_embeddings=False)).untied == ()


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_an_encoder_decoder_with_another_copy_of_its_embedding_is_refused(name: str, make_dense: MakeDense) -> None:
    directory = make_dense(architecture="T5ForConditionalGeneration")
    rewrite(directory, lambda state: state.update({name: state["shared.weight"].clone()}))
    settings = UpcycleConfig(num_experts=4, num_experts_per_tok=1)
    assert plan_upcycle(open_checkpoint(directory), settings).dropped == (name,)
    rewrite(directory, lambda state: state[name].mul_(2))
    assert refusal(plan_upcycle, open_checkpoint(directory), settings) == (
        f"{directory / 'model.safetensors'}: tensor '{name}' differs from the embedding, so transformers uses both; "
        "a mixture made of "
        "T5ForConditionalGeneration has one for both; remove the tensor if the embedding alone is meant"
    )


def test_a_gemma_with_a_head_of_its_own_is_refused_by_what_is_stored(make_dense: MakeDense) -> None:
    directory = make_dense(architecture="GemmaForCausalLM", head_dim=16)
    rewrite(directory, lambda state: state.update({HEAD: state[EMBEDDING].flip(0).contiguous()}))
    assert refusal(plan_upcycle, open_checkpoint(directory), UpcycleConfig(num_experts=4)).startswith(
        f"{directory / 'model.safetensors'}: tensor 'lm_head.weight' differs from the embedding, so transformers "
        "uses both; "
    )


def test_a_head_of_another_shape_is_not_passed_over(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({HEAD: torch.ones(301, 32)}))
    assert refusal(plan_upcycle, open_checkpoint(folder), UpcycleConfig(num_experts=4)) == (
        f"{folder}: tensor 'lm_head.weight' has shape [301, 32]; by config.json it must be [300, 32]"
    )


# Other weights than those in model.safetensors


MERGE = (
    "a checkpoint must be whole: merge it by peft's PeftModel.from_pretrained(model, adapter).merge_and_unload(), "
    "write the result with "
    "save_pretrained() into a new directory, and give that"
)


def add_adapter(base: Path, into: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(into)


def test_an_adapter_beside_its_base_is_refused_wherever_a_checkpoint_is_opened(
    folder: Path, dense_checkpoint: Path
) -> None:
    add_adapter(dense_checkpoint, folder)
    assert not torch.equal(logits(folder), logits(dense_checkpoint))  # transformers does apply it
    message = (
        f"{folder / 'adapter_config.json'}: an adapter, which transformers applies to the model beside it; {MERGE}"
    )
    assert refusal(open_checkpoint, folder) == message
    assert refusal(load_whole, AutoModelForCausalLM, folder, torch.float32) == message


def test_the_merged_model_is_taken(folder: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    """As the message says."""
    add_adapter(dense_checkpoint, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(dense_checkpoint, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().save_pretrained(tmp_path / "merged")
    add_adapter(dense_checkpoint, folder)
    with torch.no_grad():
        found = load_whole(AutoModelForCausalLM, tmp_path / "merged", torch.float32)(IDS).logits
    # A product by the sum of two matrices, and the sum of two products.
    assert float((found - logits(folder)).abs().max() / found.abs().max()) < 1e-5


def test_an_adapter_alone_is_told_to_be_one(dense_checkpoint: Path, tmp_path: Path) -> None:
    add_adapter(dense_checkpoint, tmp_path)
    assert (
        refusal(open_checkpoint, tmp_path)
        == f"{tmp_path / 'adapter_config.json'}: an adapter without its model; {MERGE}"
    )


@pytest.mark.parametrize("verb", ["check", "run"])
def test_the_commands_refuse_an_adapter_before_any_work(
    verb: str, folder: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    add_adapter(dense_checkpoint, folder)
    text = Path(__file__)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(
            {"source": str(folder), "data": {"source": {"kind": "text", "train": [str(text)]}, "block_size": 32}}
        )
    )
    finished = CliRunner().invoke(
        main, [verb, str(recipe), *(["--workdir", str(tmp_path / "work")] if verb == "run" else [])]
    )
    assert finished.exit_code == 1
    assert (
        finished.stderr
        == f"Error: {folder / 'adapter_config.json'}: an adapter, which transformers applies to the model beside it; "
        f"{MERGE}\n"
    )
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").glob("source-*"))


def test_an_index_of_other_files_beside_a_single_file_is_refused(folder: Path) -> None:
    expected = logits(folder)
    other = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")})
    )
    assert torch.equal(logits(folder), expected)  # transformers passes the index over
    assert refusal(open_checkpoint, folder) == (
        f"{folder / 'model.safetensors.index.json'}: names model-00001-of-00001.safetensors, and transformers loads "
        "model.safetensors beside it "
        "instead; remove the one that is stale: the index with its files, or model.safetensors"
    )
    (folder / "model.safetensors").rename(folder / "single")
    assert {entry.file.name for entry in open_checkpoint(folder).entries.values()} == {
        "model-00001-of-00001.safetensors"
    }
    (folder / "single").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, "model.safetensors")})
    )
    assert {entry.file.name for entry in open_checkpoint(folder).entries.values()} == {"model.safetensors"}


def test_a_config_that_names_other_weights_is_refused(folder: Path) -> None:
    before = logits(folder)
    save_file(
        {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "b.safetensors",
        {"format": "pt"},
    )
    path = folder / "config.json"
    for named, refused in (("model.safetensors", False), ("b.safetensors", True)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": named}))
        assert torch.equal(logits(folder), before) != refused  # transformers does take them
        if refused:
            assert refusal(open_checkpoint, folder) == (
                f"{path}: transformers_weights is 'b.safetensors', which transformers loads in place of "
                "model.safetensors; "
                "load the model and write it with save_pretrained() into a new directory, or remove the field if "
                "model.safetensors is meant"
            )
        else:
            open_checkpoint(folder)


def test_parts_of_a_distributed_checkpoint_are_refused(folder: Path) -> None:
    part = folder / "shard-00000-model-00001-of-00001.safetensors"
    shutil.copyfile(folder / "model.safetensors", part)
    assert refusal(open_checkpoint, folder) == (
        f"{part}: part of a distributed checkpoint, which transformers loads in place of model.safetensors; "
        "load the model and write it with save_pretrained() into a new directory, or remove these files if they are "
        "stale"
    )
