"""What cannot be upcycled is refused in one line before anything is written, and what is dropped is listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import UNTIED
from plans import (
    T5,
    TOP_1,
    edited,
    plan,
    refusal,
)
from told import tells

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.plan import plan_upcycle
from dense2moe.upcycle.building.source import expected_shapes
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import CONVERSIONS

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]


# Refused before anything is written


def test_a_value_that_no_target_holds_is_refused_with_the_files_name(make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(mlp_bias=True)
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: mlp_bias is True; MixtralForCausalLM needs False: no mixture-of-experts "
        "architecture of transformers has "
        "expert biases with this FFN (the nearest target is mixtral); upcycle.target mixture would hold it"
    )


def test_a_gated_t5_cannot_become_switch(make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(architecture=T5, feed_forward_proj="gated-gelu")
    assert refusal(directory, tmp_path, **TOP_1, target="switch_transformers") == (
        f"{directory / 'config.json'}: feed_forward_proj is gated-gelu; SwitchTransformersForConditionalGeneration "
        "needs one without a gate; upcycle.target mixture would hold it"
    )


def test_a_family_whose_ffn_cannot_be_taken_out_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    changed = {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    directory = edited(dense_checkpoint, tmp_path / "dense", changed)
    assert tells(refusal(directory, tmp_path), directory / "config.json", "BitNetForCausalLM (bitnet)", "a norm within")


def test_a_field_that_nobody_classified_is_refused_unless_it_has_its_default(
    make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = tuple(name for name in CONVERSIONS[0].carried if name != "rms_norm_eps")
    monkeypatch.setattr(
        "dense2moe.upcycle.models.table.CONVERSIONS", (Conversion(**{**vars(CONVERSIONS[0]), "carried": without}),)
    )
    assert plan(make_dense(rms_norm_eps=transformers.LlamaConfig().rms_norm_eps)).target_config.num_local_experts == 4
    directory = make_dense(rms_norm_eps=0.5)
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: rms_norm_eps is 0.5, a setting that MixtralForCausalLM does not know; "
        "remove it or set its default"
    )


def test_values_that_the_targets_own_config_refuses_are_refused_with_its_reason(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    directory = edited(dense_checkpoint, tmp_path / "dense", {"attention_dropout": None})
    before, reason = refusal(directory, tmp_path).split(": MixtralForCausalLM refuses these values: ")
    assert before == str(directory / "config.json")
    assert "attention_dropout" in reason


@pytest.mark.parametrize(
    ("architecture", "name", "number", "message"),
    [
        (
            "LlamaForCausalLM",
            "num_hidden_layers",
            10**9,
            "is 1000000000; it must be at most 100000; the file is corrupt",
        ),
        (
            "Qwen2ForCausalLM",
            "num_hidden_layers",
            10**9,
            "is 1000000000; it must be at most 100000; the file is corrupt",
        ),
        ("LlamaForCausalLM", "num_hidden_layers", 1000, "is 1000; the files hold 20 tensors, too few"),
        ("LlamaForCausalLM", "num_hidden_layers", 0, "is 0; it must be at least 1"),
        ("LlamaForCausalLM", "num_hidden_layers", -1, "is -1; it must be at least 1"),
        (T5, "num_layers", 1000, "is 1000; the files hold 63 tensors, too few"),
        (T5, "num_decoder_layers", 10**9, "is 1000000000; it must be at most 100000; the file is corrupt"),
        (T5, "num_decoder_layers", 0, "is 0; it must be at least 1"),
    ],
)
def test_an_absurd_number_of_layers_is_refused_before_a_model_of_it_is_built(
    architecture: str, name: str, number: int, message: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    directory = edited(make_dense(architecture=architecture), tmp_path / "dense", {name: number})
    settings = TOP_1 if architecture == T5 else {}
    assert refusal(directory, tmp_path, **settings) == f"{directory / 'config.json'}: {name} {message}"


@pytest.mark.parametrize(
    ("architecture", "name", "value", "reason"),
    [
        ("LlamaForCausalLM", "intermediate_size", -1, "RuntimeError: Trying to create tensor with negative dimension"),
        ("LlamaForCausalLM", "num_key_value_heads", 0, "ZeroDivisionError: "),
        ("LlamaForCausalLM", "head_dim", 0, "ZeroDivisionError: "),
        ("LlamaForCausalLM", "hidden_act", "sillu", "KeyError: 'sillu'"),
        ("LlamaForCausalLM", "pad_token_id", 300, "AssertionError: Padding_idx must be within num_embeddings"),
        (T5, "dropout_rate", 2, "ValueError: dropout probability has to be between 0 and 1"),
    ],
)
def test_values_of_which_transformers_can_build_no_model_are_refused_with_its_reason(
    architecture: str, name: str, value: Any, reason: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    directory = edited(make_dense(architecture=architecture), tmp_path / "dense", {name: value})
    message = refusal(directory, tmp_path, **(TOP_1 if architecture == T5 else {}))
    assert message.startswith(
        f"{directory / 'config.json'}: transformers cannot build {architecture} of these values ({reason}"
    )
    assert message.endswith("); correct the file")


def test_a_model_without_layers_is_refused(make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(num_hidden_layers=0)
    assert refusal(directory, tmp_path) == f"{directory / 'config.json'}: num_hidden_layers is 0; it must be at least 1"


def test_a_missing_tensor_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    directory = edited(
        dense_checkpoint, tmp_path / "dense", tensors=lambda state: state.pop("model.layers.1.mlp.up_proj.weight")
    )
    assert refusal(directory, tmp_path) == (
        f"{directory}: tensor 'model.layers.1.mlp.up_proj.weight' is missing; by config.json it must be there with "
        "shape [48, 32]"
    )


def test_a_missing_head_is_refused_where_the_config_does_not_tie_it(dense_checkpoint: Path, tmp_path: Path) -> None:
    directory = edited(dense_checkpoint, tmp_path / "dense", config=UNTIED)
    assert (
        refusal(directory, tmp_path)
        == f"{directory}: tensor 'lm_head.weight' is missing; by config.json it must be there with shape [300, 32]"
    )


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "vision.weight"]
)
def test_a_tensor_that_would_be_lost_is_refused(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    directory = edited(dense_checkpoint, tmp_path / "dense", tensors=lambda state: state.update({name: torch.ones(1)}))
    assert (
        refusal(directory, tmp_path)
        == f"{directory}: tensor '{name}' has no place in LlamaForCausalLM; it would be lost; remove it"
    )


def test_a_tensor_of_another_shape_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    directory = edited(
        dense_checkpoint, tmp_path / "dense", tensors=lambda state: state.update({name: state[name].T.contiguous()})
    )
    assert (
        refusal(directory, tmp_path)
        == f"{directory}: tensor '{name}' has shape [48, 32]; by config.json it must be [32, 48]"
    )


@pytest.mark.parametrize(
    ("dtype", "stored", "hint"),
    [
        (torch.float64, "F64", ""),
        (torch.int32, "I32", "; dequantize the model first, or give it as it was before"),
        (torch.float8_e4m3fn, "F8_E4M3", "; dequantize the model first, or give it as it was before"),
        (torch.float8_e5m2, "F8_E5M2", "; dequantize the model first, or give it as it was before"),
    ],
)
def test_a_tensor_of_another_dtype_is_refused_by_name(
    dtype: torch.dtype, stored: str, hint: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = edited(
        dense_checkpoint, tmp_path / "dense", tensors=lambda state: state.update({name: state[name].to(dtype)})
    )
    assert tells(refusal(directory, tmp_path), f"{directory}: tensor '{name}'", stored, "F32, F16, BF16", hint)


# What is dropped


def test_tensors_that_no_forward_pass_reads_are_listed_as_dropped_and_written_nowhere(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        for layer in range(2):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)

    edited(dense_checkpoint, tmp_path, tensors=add)
    found = plan(tmp_path)
    assert found.dropped == (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    )
    assert found.writes == plan(dense_checkpoint).writes
    assert plan(dense_checkpoint).dropped == ()


def test_what_old_t5_files_hold_beside_the_model_is_dropped(make_dense: MakeDense, tmp_path: Path) -> None:
    """The published t5-small has copies of its embedding, and a bias that its cross-attention does not add."""
    dense = make_dense(architecture=T5)
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")
    edited(
        dense,
        tmp_path,
        tensors=lambda state: state.update(
            {bias: torch.ones(32, 4), **{name: state["shared.weight"].clone() for name in copies}}
        ),
    )
    found = plan(tmp_path, **TOP_1)
    assert found.dropped == (bias, *copies)
    assert found.writes == plan(dense, **TOP_1).writes


def test_expected_shapes_leave_out_tied_copies(dense_checkpoint: Path, make_dense: MakeDense) -> None:
    for directory in (dense_checkpoint, make_dense(tie_word_embeddings=False)):
        checkpoint = open_checkpoint(directory)
        stored = {name: entry.shape for name, entry in checkpoint.entries.items()}
        assert expected_shapes(checkpoint.config, "LlamaForCausalLM", "config.json") == stored


def test_scales_of_quantized_weights_are_not_to_be_removed(dense_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    directory = edited(dense_checkpoint, tmp_path / "dense", tensors=lambda state: state.update({name: torch.ones(1)}))
    assert refusal(directory, tmp_path) == (
        f"{directory}: tensor '{name}' belongs to quantized weights, which are wrong without it; dequantize the "
        "model first, or give it as it was "
        "before"
    )


@pytest.mark.parametrize(("field", "value"), [("sliding_window", 4096), ("attention_chunk_size", 8)])
def test_a_window_that_only_the_cache_would_see_is_refused(
    field: str, value: int, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Llama has none, and decodes with one where its config says so."""
    directory = Path(shutil.copytree(dense_checkpoint, tmp_path / "windowed"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {field: value}))
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: {field} is {value}; LlamaForCausalLM has no windows, but the key-value cache "
        "of transformers takes them from "
        "there, so that decoding would differ from prefill; remove the field"
    )
    (directory / "config.json").write_text(json.dumps(config | {field: None}))
    plan_upcycle(open_checkpoint(directory), UpcycleConfig())
