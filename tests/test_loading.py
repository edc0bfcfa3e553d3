"""A model that is read tensor by tensor is what transformers' own loading gives."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

import upcycle.memory
from tests.conftest import MakeDense
from upcycle.loading import load_pretrained
from upcycle.memory import HEAP_BYTES, give_heap_back, release_growth, release_memory, small_heap


def check_equal(auto_class: Any, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    own, info = load_pretrained(auto_class, directory, dtype)
    theirs = auto_class.from_pretrained(directory, dtype=dtype, local_files_only=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = theirs.state_dict(), own.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)
    assert own.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert (type(own), own.name_or_path, own.config.name_or_path) == (type(theirs), theirs.name_or_path, theirs.config.name_or_path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in own.parameters())
    return own  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_experts_and_tied_heads_are_as_transformers_loads_them(mixture_checkpoint: Path, dtype: torch.dtype) -> None:
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
    monkeypatch.setattr(upcycle.memory, "_find_resident", lambda: lambda: resident[0])
    monkeypatch.setattr(upcycle.memory, "_find_trim", lambda: given.append)
    monkeypatch.setattr(upcycle.memory._Least, "bytes", 1000)
    for size, times in ((1000 + HEAP_BYTES, 0), (1001 + HEAP_BYTES, 1), (1002 + HEAP_BYTES, 1), (500, 1), (501 + HEAP_BYTES, 2)):
        resident[0] = size
        give_heap_back()
        assert len(given) == times


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_holds_only_itself_is_freed_whether_the_process_has_grown_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = upcycle.memory._find_resident()
    monkeypatch.setattr(upcycle.memory._Least, "bytes", 1 << 50 if resident is None else resident())  # by hooks, with all in use
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
    monkeypatch.setattr(upcycle.memory, "_find_resident", lambda: None)
    give_heap_back()
