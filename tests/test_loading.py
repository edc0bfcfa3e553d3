"""A model that is read tensor by tensor is what transformers' own loading gives.

And one that is not whole is refused in one line.
"""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from told import tells
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dense2moe.upcycle import memory
from dense2moe.upcycle.checkpoints.loading import check_whole, load_pretrained, load_whole
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.memory import HEAP_BYTES, give_heap_back, release_growth, release_memory, small_heap
from tests.conftest import MakeDense


def check_equal(auto_class: Any, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    own, info = load_pretrained(auto_class, directory, dtype)
    theirs = auto_class.from_pretrained(directory, dtype=dtype, local_files_only=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = theirs.state_dict(), own.state_dict()
    assert list(found) == list(expected)
    assert all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )
    assert own.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert (type(own), own.name_or_path, own.config.name_or_path) == (
        type(theirs),
        theirs.name_or_path,
        theirs.config.name_or_path,
    )
    assert all(parameter.data_ptr() % 64 == 0 for parameter in own.parameters())
    return own  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_experts_and_tied_heads_are_as_transformers_loads_them(
    mixture_checkpoint: Path, dtype: torch.dtype
) -> None:
    model: Any = check_equal(AutoModelForCausalLM, mixture_checkpoint, dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_are_all_read(make_dense: MakeDense) -> None:
    directory = make_dense(max_shard_size="20KB", tie_word_embeddings=False)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    check_equal(AutoModelForCausalLM, directory)


def test_an_encoder_decoder_is_as_transformers_loads_it(make_dense: MakeDense) -> None:
    check_equal(AutoModelForSeq2SeqLM, make_dense(architecture="T5ForConditionalGeneration"))


def test_settings_of_generation_come_with_the_model(make_dense: MakeDense, tmp_path: Path) -> None:
    shutil.copytree(make_dense(), tmp_path, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=[1, 2], top_k=7, do_sample=True).save_pretrained(tmp_path)
    assert check_equal(AutoModelForCausalLM, tmp_path).generation_config.top_k == 7  # type: ignore[union-attr]
    (tmp_path / "generation_config.json").unlink()
    assert check_equal(AutoModelForCausalLM, tmp_path).generation_config.eos_token_id == 1  # type: ignore[union-attr]


def test_what_transformers_refuses_is_refused_by_transformers(make_dense: MakeDense, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        load_pretrained(AutoModelForCausalLM, make_dense(architecture="T5ForConditionalGeneration"), torch.float32)
    shutil.copytree(make_dense(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_pretrained(AutoModelForCausalLM, tmp_path, torch.float32)


# Whole or refused


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(load: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.fixture
def copy(dense_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))


def test_a_whole_checkpoint_is_loaded_as_transformers_loads_it(
    dense_checkpoint: Path, mixture_checkpoint: Path, make_dense: MakeDense
) -> None:
    seq2seq = make_dense(architecture="T5ForConditionalGeneration")
    for auto_class, directory in (
        (AutoModelForCausalLM, dense_checkpoint),
        (AutoModelForCausalLM, mixture_checkpoint),
        (AutoModelForSeq2SeqLM, seq2seq),
    ):
        check_whole(auto_class, directory)
        model = load_whole(auto_class, directory, torch.bfloat16)
        assert not model.training
        expected = auto_class.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    eager = load_whole(AutoModelForCausalLM, mixture_checkpoint, torch.float32, experts_implementation="eager")
    assert eager.config._experts_implementation == "eager"


SHAPES = "of shape [16]; by config.json it must be [32]; correct one of the two"
INCOMPLETE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda state: state.pop("model.norm.weight"),
        "tensor 'model.norm.weight' missing, which transformers would initialize at random; restore the file that held "
        "it",
    ),
    "left over": (
        lambda state: state.update({"evil name": torch.ones(1)}),
        "tensor 'evil name' unused, which transformers would ignore; remove it, or correct config.json",
    ),
    "another shape": (
        lambda state: state.update({"model.norm.weight": torch.ones(16)}),
        f"tensor 'model.norm.weight' {SHAPES}",
    ),
}


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_what_transformers_would_only_warn_about_is_refused(fault: str, copy: Path) -> None:
    change, reason = INCOMPLETE[fault]
    rewrite(copy, change)
    assert refusal(load_whole, AutoModelForCausalLM, copy, torch.float32) == f"{copy}: {reason}"
    assert refusal(check_whole, AutoModelForCausalLM, copy) == f"{copy}: {reason}"


def test_a_checkpoint_is_checked_once_and_anew_when_a_file_changes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_whole(AutoModelForCausalLM, copy)
    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("checked once more"))
        check_whole(AutoModelForCausalLM, copy)
    rewrite(copy, lambda state: state.pop("model.norm.weight"))
    for _ in range(2):
        assert "'model.norm.weight' missing" in refusal(check_whole, AutoModelForCausalLM, copy)


def test_names_and_shapes_are_checked_without_reading_a_weight(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reader in (
        "dense2moe.upcycle.checkpoints.tensors._read",
        "dense2moe.upcycle.checkpoints.loading.safe_open",
        "safetensors.safe_open",
        "transformers.modeling_utils.safe_open",
    ):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("a weight was read"))
    check_whole(AutoModelForCausalLM, copy)


def test_rotary_tensors_of_old_checkpoints_are_harmless(copy: Path) -> None:
    rewrite(copy, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    check_whole(AutoModelForCausalLM, copy)
    load_whole(AutoModelForCausalLM, copy, torch.float32)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut weights": lambda directory: cut(directory / "model.safetensors"),
    "empty weights": lambda directory: (directory / "model.safetensors").write_bytes(b""),
    "a pointer of git-lfs": lambda directory: (directory / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid 0\n"
    ),
    "cut config": lambda directory: cut(directory / "config.json"),
    "a config that is a list": lambda directory: (directory / "config.json").write_text("[]"),
    "no config": lambda directory: (directory / "config.json").unlink(),
    "no weights": lambda directory: (directory / "model.safetensors").unlink(),
    "a config that makes no model": lambda directory: edit_config(directory, num_attention_heads=0),
    "a negative width": lambda directory: edit_config(directory, intermediate_size=-3),
    "more layers than tensors": lambda directory: edit_config(directory, num_hidden_layers=99_999),
    "a vocabulary that no memory holds": lambda directory: edit_config(directory, vocab_size=10**14),
    "an unknown activation": lambda directory: edit_config(directory, hidden_act="nonesuch"),
    "an unknown rotary embedding": lambda directory: edit_config(
        directory, rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}
    ),
    "a generation config that transformers refuses": lambda directory: (
        directory / "generation_config.json"
    ).write_text('{"max_new_tokens": -5}'),
    "a generation config that is a list": lambda directory: (directory / "generation_config.json").write_text("[]"),
    "an index that is no JSON": lambda directory: (
        (directory / "model.safetensors").rename(directory / "a.safetensors"),
        (directory / "model.safetensors.index.json").write_text("{"),
    ),
    "quantized weights": lambda directory: edit_config(
        directory, quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "a directory that is a file": lambda directory: (shutil.rmtree(directory), directory.write_text("")),
    "no directory": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_of_ours_that_begins_with_the_directory(damage: str, copy: Path) -> None:
    DAMAGES[damage](copy)
    assert refusal(load_whole, AutoModelForCausalLM, copy, torch.float32).startswith(str(copy))


def test_a_model_of_another_kind_is_refused_without_a_list_of_all_kinds(make_dense: MakeDense) -> None:
    directory = make_dense(architecture="T5ForConditionalGeneration")
    assert refusal(load_whole, AutoModelForCausalLM, directory, torch.float32) == (
        f"{directory / 'config.json'}: model_type is t5, which transformers' AutoModelForCausalLM does not load; "
        "give a checkpoint of the right kind"
    )


def test_memory_that_runs_out_is_no_fault_of_the_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr("dense2moe.upcycle.checkpoints.loading.load_pretrained", run_out)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_whole(AutoModelForCausalLM, copy, torch.float32)


class _Trap:
    """What a pickle would do."""

    def __init__(self, into: Path) -> None:
        self.into = into

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.into,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_pickle_is_ever_read(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).write_bytes(pickle.dumps(_Trap(tmp_path / "owned")))
    load_whole(AutoModelForCausalLM, copy, torch.float32)  # beside safetensors, it is left alone
    (copy / "model.safetensors").unlink()
    message = refusal(load_whole, AutoModelForCausalLM, copy, torch.float32)
    assert tells(message, f"{copy / name}: pickled weights", "convert them to model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_pretrained(AutoModelForCausalLM, copy, torch.float32)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("architecture", "loads"), [("LlamaForCausalLM", True), ("OwnForCausalLM", False)])
def test_code_beside_a_checkpoint_is_never_run(
    architecture: str, loads: bool, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("was asked whether code may be run"))
    source = f"from pathlib import Path\nPath({str(tmp_path / 'owned')!r}).touch()\n"
    (copy / "own.py").write_text(
        f"{source}from transformers import LlamaConfig as Own, LlamaForCausalLM as OwnForCausalLM\n"
    )
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(copy, auto_map=auto_map, architectures=[architecture])
    if loads:
        assert type(load_whole(AutoModelForCausalLM, copy, torch.float32)).__name__ == architecture
    else:
        assert "'auto_map' asks for code from the checkpoint" in refusal(
            load_whole, AutoModelForCausalLM, copy, torch.float32
        )
    assert not (tmp_path / "owned").exists()


@torch.no_grad()
def test_a_head_that_transformers_did_not_tie_is_told_untied(copy: Path, tmp_path: Path) -> None:
    rewrite(
        copy, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].flip(0).contiguous()})
    )
    model = load_whole(AutoModelForCausalLM, copy, torch.float32)
    assert model.config.tie_word_embeddings is False
    ids = torch.arange(2, 20)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False


def test_no_file_stays_mapped(mixture_checkpoint: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    model, _ = load_pretrained(AutoModelForCausalLM, mixture_checkpoint, torch.float32)
    assert str(mixture_checkpoint) not in maps.read_text()
    assert model.num_parameters() > 0


def test_hooks_come_off_however_it_ends(mixture_checkpoint: Path) -> None:
    model, _ = load_pretrained(AutoModelForCausalLM, mixture_checkpoint, torch.float32)
    with pytest.raises(KeyError), small_heap(model):
        assert sum(bool(module._forward_pre_hooks) for module in model.modules()) == model.config.num_hidden_layers
        raise KeyError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_heap_is_given_back_when_the_process_has_grown_and_then_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, given = [1000], []
    monkeypatch.setattr(memory, "_find_resident", lambda: lambda: resident[0])
    monkeypatch.setattr(memory, "_find_trim", lambda: given.append)
    monkeypatch.setattr(memory._Least, "bytes", 1000)
    for size, times in (
        (1000 + HEAP_BYTES, 0),
        (1001 + HEAP_BYTES, 1),
        (1002 + HEAP_BYTES, 1),
        (500, 1),
        (501 + HEAP_BYTES, 2),
    ):
        resident[0] = size
        give_heap_back()
        assert len(given) == times


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_holds_only_itself_is_freed_whether_the_process_has_grown_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = memory._find_resident()
    # by hooks, with all in use
    monkeypatch.setattr(memory._Least, "bytes", 1 << 50 if resident is None else resident())
    gc.disable()  # it might free the cycle before we do
    try:
        cycle = weakref.ref(_Cycle())
        release_growth()
        assert (cycle() is None) == (resident is None)
        release_memory()
    finally:
        gc.enable()
    assert cycle() is None


def test_a_system_that_tells_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_find_resident", lambda: None)
    give_heap_back()
