"""The config of the mixture loses no value of the dense model's, and takes no default of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import SPARSE
from plans import (
    T5,
    TOP_1,
    becomes,
    edited,
    every_conversion,
    name_of,
    once_of_each,
    plan,
    quiet,
    talkative,
)
from shapes import each_shape
from transformers import AutoConfig

from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.heads import split_class
from dense2moe.upcycle.models.table import CONVERSIONS

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def dense_of(make_dense: MakeDense) -> MakeDense:
    """Checkpoints by what is asked of them, each made once. Read only."""
    return once_of_each(make_dense)


@every_conversion
def test_every_value_survives_to_the_reloaded_target(row: Conversion, dense_of: MakeDense, tmp_path: Path) -> None:
    source = talkative(row)
    directory = dense_of(row, source)
    dense = AutoConfig.from_pretrained(directory)
    settings = {"num_experts": 6, "num_experts_per_tok": 3, **SPARSE[row.target.model_type].settings}
    plan(directory, target=row.target.model_type, **settings).target_config.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.model_type == row.target.model_type
    carried = (*row.carried, *row.optional)
    assert {name: getattr(found, name) for name in carried} == {name: getattr(dense, name) for name in carried}
    for name in source.keys() & set(carried):  # and none of them is a default that was never carried
        assert getattr(found, name) == source[name] != getattr(type(found)(), name, None)
    assert {name: getattr(found, name) for name in becomes(row).derived} == becomes(row).derived
    width = {"t5": 64}.get(row.family.model_type, 48)
    assert (getattr(found, row.experts.count_field), getattr(found, row.experts.width_field)) == (6, width)
    assert row.experts.top_1 or found.num_experts_per_tok == 3
    assert found.dtype == dense.dtype == torch.float32


def name_of_rope(row: Conversion, rope: str) -> str:
    return f"{name_of(row)} {rope}"


ROTARY = [(row, rope) for row in CONVERSIONS if row.family.model_type not in ("phi3", "t5") for rope in ROPES]
# one that most become, one that rotates half of each head, and one whose config has fields of its own for it
OWN_ROTARY = ("mixtral", "glm4_moe", "cohere2_moe")


def rotations(architecture: str, config: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a model's rotary embedding at the first `length` positions."""
    modeling = sys.modules[getattr(transformers, architecture).__module__]
    embedding = getattr(modeling, f"{split_class(architecture)[0]}RotaryEmbedding")(config)
    return embedding(torch.zeros(1), torch.arange(length)[None])


@pytest.mark.parametrize(
    ("row", "rope"),
    each_shape(
        ROTARY,
        # one scaling of all families, and all scalings where a family or its target has something of its own
        {name_of_rope(row, rope) for row, rope in ROTARY if rope == "llama3" or row.target.model_type in OWN_ROTARY},
        name=lambda case: name_of_rope(*case),
    ),
)
def test_rotary_embeddings_of_every_kind_are_those_of_the_dense_model(
    rope: str, row: Conversion, dense_of: MakeDense, tmp_path: Path
) -> None:
    directory = dense_of(row, {"rope_parameters": ROPES[rope], "head_dim": 8})
    settings = SPARSE[row.target.model_type].settings
    plan(directory, target=row.target.model_type, **settings).target_config.save_pretrained(tmp_path)
    dense, found = AutoConfig.from_pretrained(directory), AutoConfig.from_pretrained(tmp_path)
    # which rotates halves unless it is told
    whole_heads = {"partial_rotary_factor": 1.0} if row.target.model_type == "glm4_moe" else {}
    assert dense.rope_parameters == ROPES[rope]
    assert found.rope_parameters == ROPES[rope] | whole_heads
    for length in (40, 300):  # within the length that the rotations were made for, and beyond
        expected = rotations(row.family.architecture, dense, length)
        assert all(map(torch.equal, rotations(row.target.architecture, found, length), expected))


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_phi3s_long_rotary_embedding_finds_its_original_length(
    target: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    rope = {name: ROPES["longrope"][name] for name in ("rope_type", "rope_theta", "short_factor", "long_factor")}
    directory = make_dense(architecture="Phi3ForCausalLM", rope_parameters=rope, original_max_position_embeddings=64)
    conversion = plan(directory, target=target)
    conversion.target_config.save_pretrained(tmp_path)
    dense, found = AutoConfig.from_pretrained(directory), AutoConfig.from_pretrained(tmp_path)
    assert found.rope_parameters == rope | {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
    short, long = (rotations("Phi3ForCausalLM", dense, length) for length in (40, 100))
    assert not torch.equal(short[0], long[0][:, :40])  # the dense model does stretch
    for length, expected in ((40, short), (100, long)):
        assert all(map(torch.equal, rotations(conversion.conversion.target.architecture, found, length), expected))


# Fields that a config may leave out, and that change no shape.
OMITTED = (
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "embedding_multiplier",
    "logits_scaling",
)


@pytest.mark.parametrize(
    ("architecture", "differing"),
    [
        ("LlamaForCausalLM", {"rms_norm_eps", "rope_parameters", "max_position_embeddings"}),
        ("MistralForCausalLM", {"rms_norm_eps", "rope_parameters"}),
        ("GemmaForCausalLM", {"rms_norm_eps", "rope_parameters", "max_position_embeddings", "hidden_act"}),
        ("Qwen2ForCausalLM", set()),
        ("Qwen3ForCausalLM", set()),
        (
            "Olmo2ForCausalLM",
            {"rms_norm_eps", "rope_parameters", "max_position_embeddings", "pad_token_id", "eos_token_id"},
        ),
        ("GraniteForCausalLM", set()),
    ],
)
def test_keys_that_an_old_config_leaves_out_take_the_sources_defaults_and_not_the_targets(
    architecture: str, differing: set[str], make_dense: MakeDense, tmp_path: Path
) -> None:
    edited(make_dense(architecture=architecture), tmp_path, without=OMITTED)
    found = plan(tmp_path)
    source, target = AutoConfig.for_model(found.conversion.family.model_type), type(found.target_config)()
    carried = [name for name in OMITTED if name in found.conversion.carried]
    assert {name: getattr(found.target_config, name) for name in carried} == {
        name: getattr(source, name) for name in carried
    }
    assert {
        name for name in carried if getattr(source, name) != getattr(target, name)
    } >= differing  # so that it could have gone wrong


def test_a_mistral_that_leaves_out_its_window_has_one_where_a_mixtral_has_none(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    edited(make_dense(architecture="MistralForCausalLM"), tmp_path, without=("sliding_window",))
    assert plan(tmp_path).target_config.sliding_window == transformers.MistralConfig().sliding_window == 4096
    assert transformers.MixtralConfig().sliding_window is None


def test_a_t5_that_leaves_out_its_decoders_layers_has_as_many_as_its_encoder(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    edited(
        make_dense(architecture=T5, num_layers=2, num_decoder_layers=2),
        tmp_path,
        without=("num_decoder_layers", "layer_norm_epsilon"),
    )
    found = plan(tmp_path, **TOP_1)
    assert (found.target_config.num_layers, found.target_config.num_decoder_layers, found.num_layers) == (2, 2, 4)
    assert found.target_config.layer_norm_epsilon == transformers.T5Config().layer_norm_epsilon


def test_rope_fields_of_the_old_form_are_carried(dense_checkpoint: Path, tmp_path: Path) -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    edited(
        dense_checkpoint,
        tmp_path,
        {"rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling},
        without=("rope_parameters",),
    )
    assert plan(tmp_path).target_config.rope_parameters == LLAMA3_ROPE


def test_qwen3s_config_has_the_number_of_experts_under_both_of_its_keys(make_dense: MakeDense, tmp_path: Path) -> None:
    config = UpcycleConfig(num_experts=5, num_experts_per_tok=2)
    upcycle(make_dense(architecture="Qwen3ForCausalLM"), tmp_path, config, 0, quiet)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"], written["norm_topk_prob"]) == (5, 5, True)
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 5


@pytest.mark.parametrize(
    ("layers", "num_layers", "dense"),
    [("all", 2, []), ("last-half", 4, [0, 1]), ("every-2", 5, [0, 2, 4]), ((1,), 3, [0, 2])],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_layers_without_experts_are_named_and_keep_their_width(
    layers: Any, num_layers: int, dense: list[int], architecture: str, make_dense: MakeDense
) -> None:
    target = "qwen3_moe" if architecture == "Qwen3ForCausalLM" else "qwen2_moe"
    directory = make_dense(architecture=architecture, num_hidden_layers=num_layers)
    found = plan(directory, target=target, layers=layers, experts=ExpertsConfig(kind="split")).target_config
    assert (found.mlp_only_layers, found.intermediate_size, found.moe_intermediate_size) == (dense, 48, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_conversion
def test_the_target_keeps_the_sources_dtype_but_stores_what_is_folded_in_float32(
    dtype: torch.dtype, row: Conversion, make_dense: MakeDense
) -> None:
    dense = make_dense(dtype, architecture=row.family.architecture, **becomes(row).needs)
    found = plan(dense, target=row.target.model_type, **SPARSE[row.target.model_type].settings)
    assert found.target_config.dtype == dtype
    biases = {w.spec.name: w.spec.dtype for w in found.writes if w.spec.name.endswith(SELECTION_BIASES)}
    assert set(biases.values()) <= {torch.float32}
    folded = {write.spec.name for write in found.writes if write.spec.dtype != dtype} - set(biases)
    norms = {
        "model.norm.weight",
        *(f"model.layers.{n}.{name}_layernorm.weight" for n in (0, 1) for name in ("input", "post_attention")),
    }
    gemma = row.family.model_type == "gemma" and dtype != torch.float32
    assert folded == ({"model.embed_tokens.weight", *norms} if gemma else set())
    assert {write.spec.dtype for write in found.writes} <= {dtype, torch.float32}
