"""The table of families is complete, and the plan made from it is what transformers itself would write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from upcycle.checkpoint import open_checkpoint
from upcycle.config import UpcycleConfig
from upcycle.errors import UpcycleError
from upcycle.family import COMMON_NEUTRAL, FAMILIES, Family, find_family
from upcycle.mapping import DrawRouter, expected_shapes, plan_upcycle
from upcycle.surgery import upcycle

MakeDense = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Sources that differ in what a config can say. Bounds of transformers' validation are kept.
SOURCES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "many values": {
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "max_position_embeddings": 99,
        "attention_dropout": 0.25,
        "initializer_range": 0.1,
        "pad_token_id": 2,
        "eos_token_id": [1, 3],
        "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    },
}


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        call(*arguments)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def plan(directory: Path, num_experts: int = 4, num_experts_per_tok: int = 2) -> Any:
    return plan_upcycle(open_checkpoint(directory), UpcycleConfig(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok))


def edited(
    source: Path, target: Path, config: dict[str, Any] | None = None, tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None
) -> Path:
    """A copy of a checkpoint with other config fields and other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    state = load_file(source / "model.safetensors")
    tensors(state)
    save_file(state, target / "model.safetensors")
    return target


# The table


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_every_config_field_of_transformers_is_classified_once(family: Family) -> None:
    declared = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}
    classes = [set(family.carried), set(family.required), set(family.neutral), set(COMMON_NEUTRAL)]
    assert declared <= set.union(*classes), "a new transformers has new fields: classify them in upcycle/family.py"
    assert sum(map(len, classes)) == len(set.union(*classes))
    assert len(family.carried) == len(set(family.carried))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_what_is_carried_or_set_is_a_field_of_both_sides(family: Family) -> None:
    source = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}
    target = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.target_model_type])}
    assert {*family.carried, *family.required} <= source
    assert {*family.carried, *family.target_defaults, family.expert_count_field, "num_experts_per_tok"} <= target


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_every_field_that_only_the_target_has_is_decided(family: Family) -> None:
    only_target = {f.name for f in dataclasses.fields(CONFIG_MAPPING[family.target_model_type])} - {
        f.name for f in dataclasses.fields(CONFIG_MAPPING[family.model_type])
    }
    training_only = {"output_router_logits", "router_aux_loss_coef"}  # what is returned, and a loss: neither changes the logits
    assert only_target - training_only == {*family.target_defaults, family.expert_count_field, "num_experts_per_tok"}


def test_a_family_is_found_by_type_and_architecture() -> None:
    assert find_family("llama", ["LlamaForCausalLM"]) is find_family("llama", None) is FAMILIES[0]


@pytest.mark.parametrize(
    ("model_type", "architectures", "named"),
    [
        ("gpt2", ["GPT2LMHeadModel"], "GPT2LMHeadModel (gpt2)"),
        ("llama", ["LlamaForSequenceClassification"], "LlamaForSequenceClassification (llama)"),
        ("bert", None, "bert"),
        ("mixtral", ["MixtralForCausalLM"], "MixtralForCausalLM (mixtral)"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(model_type: str, architectures: list[str] | None, named: str) -> None:
    assert refusal(find_family, model_type, architectures) == f"config.json: {named} cannot be upcycled; supported: LlamaForCausalLM"


# The config


@pytest.mark.parametrize("source", SOURCES)
def test_every_carried_value_survives_to_the_reloaded_target(source: str, make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(**SOURCES[source])
    dense = LlamaConfig.from_pretrained(directory)
    plan(directory, num_experts=6, num_experts_per_tok=3).target_config.save_pretrained(tmp_path)
    found = MixtralConfig.from_pretrained(tmp_path)
    assert {name: getattr(found, name) for name in FAMILIES[0].carried} == {name: getattr(dense, name) for name in FAMILIES[0].carried}
    for name, value in SOURCES[source].items():  # and none of them is a default that was never carried
        assert getattr(found, name) == value
    assert (found.num_local_experts, found.num_experts_per_tok) == (6, 3)
    assert (found.sliding_window, found.router_jitter_noise) == (None, 0.0)
    assert found.architectures == ["MixtralForCausalLM"]
    assert found.dtype == dense.dtype == torch.float32


def test_keys_that_an_old_config_leaves_out_take_llamas_defaults_and_not_mixtrals(dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del config[name]
    path.write_text(json.dumps(config | {"num_key_value_heads": 2, "tie_word_embeddings": True}))
    target = plan(tmp_path).target_config
    assert target.rms_norm_eps == LlamaConfig().rms_norm_eps != MixtralConfig().rms_norm_eps
    assert target.rope_parameters["rope_theta"] == LlamaConfig().rope_parameters["rope_theta"] != MixtralConfig().rope_parameters["rope_theta"]
    assert target.head_dim == 32 // 4


def test_rope_fields_of_the_old_form_are_carried(dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    path.write_text(json.dumps(config | {"rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling}))
    assert plan(tmp_path).target_config.rope_parameters == LLAMA3_ROPE


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention_bias", True, "attention_bias is True; MixtralForCausalLM needs False: Mixtral's attention has no biases"),
        (
            "mlp_bias",
            True,
            "mlp_bias is True; MixtralForCausalLM needs False: no mixture-of-experts architecture of transformers has expert biases with Llama's FFN",
        ),
        ("pretraining_tp", 2, "pretraining_tp is 2; MixtralForCausalLM needs 1: tensor-parallel slices change the order of sums"),
    ],
)
def test_a_value_that_the_target_cannot_hold_is_refused(name: str, value: Any, message: str, make_dense: MakeDense) -> None:
    directory = make_dense(**{name: value})
    assert refusal(plan, directory) == f"{directory / 'config.json'}: {message}"


def test_a_field_that_nobody_classified_is_refused_unless_it_has_its_default(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(name for name in FAMILIES[0].carried if name != "rms_norm_eps")
    monkeypatch.setattr("upcycle.family.FAMILIES", (dataclasses.replace(FAMILIES[0], carried=without),))
    assert plan(make_dense(rms_norm_eps=LlamaConfig().rms_norm_eps)).num_experts == 4
    directory = make_dense(rms_norm_eps=0.5)
    assert refusal(plan, directory) == (
        f"{directory / 'config.json'}: rms_norm_eps is 0.5, and what it does is not known to MixtralForCausalLM; remove it or set its default"
    )


def test_more_experts_per_token_than_experts_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_experts_per_tok is 3; it must be at most num_experts, which is 2"):
        UpcycleConfig(num_experts=2, num_experts_per_tok=3)


# The tensors


def test_a_missing_tensor_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path, tensors=lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(plan, tmp_path) == (
        f"{tmp_path}: tensor 'model.layers.1.mlp.up_proj.weight' is missing; by config.json it must be there with shape [48, 32]"
    )


def test_a_missing_head_is_refused_where_the_config_does_not_tie_it(dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path, config={"tie_word_embeddings": False})
    assert refusal(plan, tmp_path) == f"{tmp_path}: tensor 'lm_head.weight' is missing; by config.json it must be there with shape [300, 32]"


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "vision.weight"])
def test_a_tensor_that_would_be_lost_is_refused(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path, tensors=lambda state: state.update({name: torch.ones(1)}))
    assert refusal(plan, tmp_path) == f"{tmp_path}: tensor '{name}' has no place in LlamaForCausalLM; it would be lost; remove it"


def test_a_tensor_of_another_shape_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edited(dense_checkpoint, tmp_path, tensors=lambda state: state.update({name: state[name].T.contiguous()}))
    assert refusal(plan, tmp_path) == f"{tmp_path}: tensor '{name}' has shape [48, 32]; by config.json it must be [32, 48]"


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float64, "F64"), (torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_tensor_of_another_dtype_is_refused(dtype: torch.dtype, stored: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    edited(dense_checkpoint, tmp_path, tensors=lambda state: state.update({"model.norm.weight": state["model.norm.weight"].to(dtype)}))
    assert refusal(plan, tmp_path) == f"{tmp_path}: tensor 'model.norm.weight' is stored as {stored}; it must be one of F32, F16, BF16"


def test_tensors_that_no_forward_pass_reads_are_listed_as_dropped(dense_checkpoint: Path, tmp_path: Path) -> None:
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


# The plan


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_plan_is_what_transformers_own_mixtral_saves(source: str, num_experts: int, make_dense: MakeDense, tmp_path: Path) -> None:
    found = plan(make_dense(**SOURCES[source]), num_experts, 1)
    AutoModelForCausalLM.from_config(found.target_config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        expected = {(name, tuple(saved.get_slice(name).get_shape())) for name in saved.keys()}  # noqa: SIM118 - safe_open is no mapping
    assert {(write.spec.name, write.spec.shape) for write in found.writes} == expected
    assert len(found.writes) == len(expected)


@pytest.mark.parametrize("source", ["tied", "untied"])
def test_every_source_tensor_is_read_once(source: str, make_dense: MakeDense) -> None:
    directory = make_dense(**SOURCES[source])
    read = [write.rule.norm if isinstance(write.rule, DrawRouter) else write.rule.source for write in plan(directory).writes]
    runs = [name for name, _ in groupby(read)]
    assert len(runs) == len(set(runs))
    assert set(runs) == set(open_checkpoint(directory).entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_target_keeps_the_sources_dtype(dtype: torch.dtype, make_dense: MakeDense) -> None:
    found = plan(make_dense(dtype))
    assert {write.spec.dtype for write in found.writes} == {found.target_config.dtype} == {dtype}


@pytest.mark.parametrize("source", ["tied", "untied"])
def test_counts_are_those_of_the_loaded_model(source: str, make_dense: MakeDense, tmp_path: Path) -> None:
    found = upcycle(make_dense(**SOURCES[source]), tmp_path, UpcycleConfig(num_experts=4), 0, lambda what, done, total: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.num_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    assert len(expected_shapes(model.config)) == len(list(model.parameters()))


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 5])
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(num_experts_per_tok: int, dense_checkpoint: Path) -> None:
    # Hidden 32, FFN 48, two layers, four heads of 8, two of them for keys and values, 300 tokens, tied; 5 experts.
    outside = 300 * 32 + 32
    attention = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32
    norms = 32 + 32
    router = 5 * 32
    expert = 3 * 32 * 48
    found = plan(dense_checkpoint, 5, num_experts_per_tok)
    assert found.num_active_parameters == outside + 2 * (attention + norms + router + num_experts_per_tok * expert)
    assert found.num_parameters == outside + 2 * (attention + norms + router + 5 * expert)
