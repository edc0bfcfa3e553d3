"""The plan is what transformers' own target would save, uses every weight of the dense model.

And loses no value of its config.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dense2moe.upcycle.building.choice import resolve_layers
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.pieces import ExpertPart, Keep, RouterRows, SelectionBias, Write, Zeros
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.source import expected_shapes
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import CONVERSIONS

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]
T5 = "T5ForConditionalGeneration"
TOP_1: dict[str, Any] = {"num_experts_per_tok": 1}

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

# Sources that say something in every field: no value is the default of a source or of a target.
_DECODER = {
    "hidden_act": "relu",
    "rms_norm_eps": 1e-3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 99,
    "attention_dropout": 0.25,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 3,
    "eos_token_id": [1, 3],
    "use_cache": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}
TALKATIVE: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "head_dim": 16},
    "mistral": {**_DECODER, "head_dim": 16, "sliding_window": 17},
    "phi3": {**_DECODER, "sliding_window": 17},
    "gemma": {**_DECODER, "head_dim": 16},
    "qwen2": {**_DECODER, "head_dim": 16, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    "qwen3": {
        **_DECODER,
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 17,
        "max_window_layers": 0,
    },
    "olmo2": {**_DECODER, "head_dim": 16, "attention_bias": True},
    "granite": {
        **_DECODER,
        "head_dim": 16,
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "t5": {
        "d_kv": 16,
        "num_heads": 3,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 65,
        "dropout_rate": 0.25,
        "layer_norm_epsilon": 1e-3,
        "initializer_factor": 0.5,
        "feed_forward_proj": "gelu",
        "use_cache": False,
        "pad_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 5,
    },
}
UNTIED = {"tie_word_embeddings": False}

_NO_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "head_dim": 16,
}
# 0 is Qwen2-MoE's None
_FULL = {
    "layer_types": ["full_attention"] * 3,
    "use_sliding_window": False,
    "sliding_window": 0,
    "qkv_bias": False,
}
_WINDOWED = {
    "layer_types": ["sliding_attention"] * 3,
    "use_sliding_window": True,
    "sliding_window": 17,
    "qkv_bias": False,
}
_PHI3_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 1.0},
    "head_dim": 8,
}
_GLM4 = {
    "attention_bias": False,
    "use_qk_norm": False,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "intermediate_size": 48,
}
# What the target's config must say of the talkative sources beside what it carries over.
DERIVED: dict[str, dict[str, Any]] = {
    "llama->mixtral": {"sliding_window": None, "router_jitter_noise": 0.0},
    "llama->qwen2_moe": {
        **_FULL,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "intermediate_size": 48,
    },
    "llama->granitemoe": _NO_MULTIPLIERS,
    "llama->granitemoeshared": {**_NO_MULTIPLIERS, "shared_intermediate_size": 0},
    "mistral->mixtral": {"router_jitter_noise": 0.0},
    "mistral->qwen2_moe": {**_WINDOWED, "head_dim": 16, "norm_topk_prob": True},
    "phi3->mixtral": _PHI3_ROPE,
    "phi3->qwen2_moe": {**_WINDOWED, **_PHI3_ROPE, "norm_topk_prob": True},
    "gemma->mixtral": {"sliding_window": None, "tie_word_embeddings": False},
    "gemma->qwen2_moe": {**_FULL, "head_dim": 16, "tie_word_embeddings": False, "norm_topk_prob": True},
    "qwen2->qwen2_moe": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "qkv_bias": True,
        "head_dim": 16,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 0,
    },
    "qwen3->qwen3_moe": {
        "use_sliding_window": True,
        "sliding_window": 17,
        "head_dim": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "olmo2->flex_olmo": {"head_dim": 16, "norm_topk_prob": True},
    "llama->glm4_moe": {**_GLM4, "head_dim": 16},
    "mistral->glm4_moe": {**_GLM4, "head_dim": 16},
    "qwen2->glm4_moe": {**_GLM4, "attention_bias": True},
    "qwen3->glm4_moe": {**_GLM4, "head_dim": 16, "use_qk_norm": True},
    "granite->granitemoe": {"head_dim": 16},
    "granite->granitemoeshared": {"head_dim": 16, "shared_intermediate_size": 0},
    "t5->switch_transformers": {
        "dense_act_fn": "gelu",
        "decoder_start_token_id": 5,
        "tie_word_embeddings": True,
        "num_sparse_encoder_layers": 4,
        "num_sparse_decoder_layers": 3,
        "expert_capacity": 1_000_000_000,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": 0.0,
    },
}


def name_of(row: Conversion) -> str:
    return f"{row.family.model_type}->{row.target.model_type}"


def talkative(row: Conversion) -> dict[str, Any]:
    """A source of this family that says something in every field that the target can hold."""
    biases = {"attention_bias": True} if name_of(row) in ("llama->granitemoe", "llama->granitemoeshared") else {}
    silenced = (
        {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
        if row.target.model_type == "glm4_moe"
        else {}
    )
    own = TALKATIVE[row.family.model_type]
    return {**own, **biases, **{name: value for name, value in silenced.items() if name in own}}


def silence(row: Conversion) -> dict[str, Any]:
    """What a family says of itself that the target cannot hold: a Mistral has a window unless it says no."""
    return {"sliding_window": None} if name_of(row) == "mistral->glm4_moe" else {}


every_conversion = pytest.mark.parametrize("row", CONVERSIONS, ids=name_of)


def quiet(what: str, done: int, total: int) -> None:
    pass


def plan(directory: Path, **settings: Any) -> UpcyclePlan:
    return plan_upcycle(open_checkpoint(directory), UpcycleConfig(**{"num_experts": 4, **settings}))


def refusal(directory: Path, tmp_path: Path, **settings: Any) -> str:
    """The one line with which the surgery ends before it writes anything."""
    output = tmp_path / "refused"
    output.mkdir()
    with pytest.raises(UpcycleError) as excinfo:
        upcycle(directory, output, UpcycleConfig(**{"num_experts": 4, **settings}), 0, quiet)
    assert list(output.iterdir()) == []
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def edited(
    source: Path,
    target: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a checkpoint with other config fields, with some left out, and with other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "config.json"
    fields = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in without}))
    state = load_file(source / "model.safetensors")
    tensors(state)
    save_file(state, target / "model.safetensors")
    return target


# The plan

SHARED = ("qwen2_moe", "granitemoeshared", "glm4_moe")
PARTIAL = ("qwen2_moe", "qwen3_moe", "switch_transformers")


def plans() -> Iterator[Any]:
    """Every conversion with every setting that its target can express, by hand.

    A conversion, a source, the settings.
    """
    for row in CONVERSIONS:
        target = row.target.model_type
        top_1 = TOP_1 if target == "switch_transformers" else {}
        cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "copies": ({}, top_1),
            "talkative": (talkative(row), top_1),
        }
        if target != "switch_transformers":
            cases["granular"] = ({}, {"experts": ExpertsConfig(kind="granular", granularity=2)})
            cases["split"] = ({}, {"experts": ExpertsConfig(kind="split"), "num_experts_per_tok": 3})
            count = row.experts.min_experts
            cases["fewest experts"] = ({}, {"num_experts": count, "num_experts_per_tok": count})
        if row.family.model_type not in ("gemma", "t5"):
            cases["untied"] = (UNTIED, {})
        if target in PARTIAL:
            cases["partial"] = (
                {"num_layers": 5} if top_1 else {"num_hidden_layers": 3},
                {"layers": "every-2", **top_1},
            )
        if target == "glm4_moe":
            cases["last layers"] = ({"num_hidden_layers": 3}, {"layers": (1, 2)})
        if target in SHARED:
            cases["half"] = ({}, {"shared_expert": "half"})
            cases["zero"] = ({}, {"shared_expert": "zero"})
            cases["half of granular"] = (
                {},
                {"shared_expert": "half", "experts": ExpertsConfig(kind="granular", granularity=2)},
            )
        for name, (source, settings) in cases.items():
            yield pytest.param(row, source, {"target": target, **settings}, id=f"{name_of(row)} {name}")


@pytest.fixture(scope="module")
def dense_of(make_dense: MakeDense) -> MakeDense:
    """Checkpoints by what is asked of them, each made once. Read only."""
    made: dict[str, Path] = {}

    def find(row: Conversion, source: dict[str, Any]) -> Path:
        source = {**silence(row), **source}
        key = f"{row.family.architecture} {source}"
        if key not in made:
            made[key] = make_dense(architecture=row.family.architecture, **source)
        return made[key]

    return find


@pytest.mark.parametrize(("row", "source", "settings"), list(plans()))
def test_the_plan_is_what_transformers_own_model_saves(
    row: Conversion, source: dict[str, Any], settings: dict[str, Any], dense_of: MakeDense, tmp_path: Path
) -> None:
    found = plan(dense_of(row, source), **settings)
    assert found.conversion is row
    assert found.target_config.architectures == [row.target.architecture]
    model = getattr(transformers, row.target.architecture)(found.target_config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        expected = {(name, tuple(saved.get_slice(name).get_shape())) for name in saved.keys()}  # noqa: SIM118 - safe_open is no mapping
    assert {(write.spec.name, write.spec.shape) for write in found.writes} == expected
    assert len(found.writes) == len(expected)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    # buffers
    biases = [write.spec.shape[0] for write in found.writes if write.spec.name.endswith("e_score_correction_bias")]
    assert len(biases) == (len(found.sites) if row.target.model_type == "glm4_moe" else 0)
    assert found.num_bytes == 4 * (found.num_parameters + sum(biases))


def filled(write: Write, checkpoint: Checkpoint) -> int:
    """Elements that the pieces of a tensor make."""
    total = 0
    for piece in write.pieces:
        match piece:
            case Keep(rows=rows):
                total += checkpoint.read_rows(rows.source, rows.start, rows.stop).numel()
            case ExpertPart(matrix=matrix):
                length, width = checkpoint.read_rows(matrix.source, matrix.start, matrix.stop).shape
                total += piece.num_neurons * (width if piece.neuron_axis == 0 else length)
            case Zeros() | SelectionBias():
                total += piece.num_elements
            case RouterRows():
                total += piece.num_rows * piece.repeat * write.spec.shape[1]
    return total


def count_uses(found: UpcyclePlan, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """How often each weight of the dense model is written somewhere."""
    uses = {name: torch.zeros(entry.shape, dtype=torch.int64) for name, entry in checkpoint.entries.items()}
    for write in found.writes:
        for piece in write.pieces:
            if isinstance(piece, Keep):
                uses[piece.rows.source][piece.rows.start : piece.rows.stop] += 1
            elif isinstance(piece, ExpertPart):
                rows = uses[piece.matrix.source][piece.matrix.start : piece.matrix.stop]
                rows[(slice(None), slice(*piece.neurons))[1 - piece.neuron_axis :]] += 1
    return uses


@pytest.mark.parametrize(("row", "source", "settings"), list(plans()))
def test_every_weight_is_used_once_and_those_of_the_ffn_once_for_each_expert(
    row: Conversion, source: dict[str, Any], settings: dict[str, Any], dense_of: MakeDense
) -> None:
    directory = dense_of(row, source)
    checkpoint, found = open_checkpoint(directory), plan(directory, **settings)
    assert all(filled(write, checkpoint) == torch.Size(write.spec.shape).numel() for write in found.writes)
    shared = settings.get("shared_expert", "none")
    kind = settings["experts"].kind if "experts" in settings else "copies"
    copies = {"copies": settings.get("num_experts", 4), "granular": 2, "split": 1}[kind]
    for name, uses in count_uses(found, checkpoint).items():
        number = re.search(r"\.(\d+)\.", name)
        dense = {"every-2": (0, 2, 4), (1, 2): (0,)}.get(settings.get("layers", "all"), ())
        sparse = number is not None and int(number[1]) not in dense
        expected = 1
        if sparse and re.search(r"\.mlp\.|DenseReluDense", name):
            expected = copies + (shared != "none") - (shared == "zero" and "down" in name)
        elif row.family.model_type == "gemma" and name == "model.embed_tokens.weight":
            expected = 2  # the embedding, multiplied, and the head, as it is
        assert (uses == expected).all(), name


def test_granites_experts_are_stacked_gate_before_up(make_dense: MakeDense) -> None:
    found = plan(make_dense(architecture="GraniteForCausalLM"), num_experts=3)
    writes = {write.spec.name: write for write in found.writes}
    first, second = (
        writes[f"model.layers.0.block_sparse_moe.{matrix}_linear.weight"] for matrix in ("input", "output")
    )
    assert (first.spec.shape, second.spec.shape) == ((3, 96, 32), (3, 32, 48))
    assert [piece.matrix.source for piece in first.pieces] == [
        f"model.layers.0.mlp.{matrix}_proj.weight" for matrix in ("gate", "up")
    ] * 3
    assert [piece.matrix.source for piece in second.pieces] == ["model.layers.0.mlp.down_proj.weight"] * 3


def test_phi3s_fused_rows_go_to_the_matrices_that_transformers_splits_them_into(make_dense: MakeDense) -> None:
    directory = make_dense(architecture="Phi3ForCausalLM")
    state = load_file(directory / "model.safetensors")
    # four heads of 8, two of them for keys and values
    query, key, value = state["model.layers.1.self_attn.qkv_proj.weight"].split([32, 16, 16])
    gate, up = state["model.layers.1.mlp.gate_up_proj.weight"].chunk(2)
    checkpoint = open_checkpoint(directory)
    pieces = {write.spec.name: write.pieces[0] for write in plan(directory).writes}
    for name, expected in (("q", query), ("k", key), ("v", value)):
        rows = pieces[f"model.layers.1.self_attn.{name}_proj.weight"].rows
        assert torch.equal(checkpoint.read_rows(rows.source, rows.start, rows.stop), expected)
    for name, expected in (("w1", gate), ("w3", up)):
        rows = pieces[f"model.layers.1.block_sparse_moe.experts.3.{name}.weight"].matrix
        assert torch.equal(checkpoint.read_rows(rows.source, rows.start, rows.stop), expected)


@pytest.mark.parametrize(
    ("experts", "neurons", "rows"),
    [
        (ExpertsConfig(), [(0, 48)] * 4, (4, 1)),
        (ExpertsConfig(kind="granular", granularity=2), [(0, 24), (24, 48), (0, 24), (24, 48)], (2, 2)),
        (ExpertsConfig(kind="split"), [(0, 12), (12, 24), (24, 36), (36, 48)], (4, 1)),
    ],
)
def test_experts_have_the_neurons_of_their_part_and_parts_of_a_copy_share_a_router_row(
    experts: ExpertsConfig, neurons: list[tuple[int, int]], rows: tuple[int, int], dense_checkpoint: Path
) -> None:
    found = plan(dense_checkpoint, experts=experts)
    parts = {write.spec.name: write.pieces[0] for write in found.writes}
    for axis, matrices in ((0, ("w1", "w3")), (1, ("w2",))):
        for matrix in matrices:
            made = [parts[f"model.layers.1.block_sparse_moe.experts.{expert}.{matrix}.weight"] for expert in range(4)]
            assert [part.neurons for part in made] == neurons
            assert {part.neuron_axis for part in made} == {axis}
    assert found.target_config.intermediate_size == neurons[0][1]
    routers = [piece for write in found.writes for piece in write.pieces if isinstance(piece, RouterRows)]
    assert [(router.num_rows, router.repeat) for router in routers] == [rows] * 2


@pytest.mark.parametrize(
    ("architecture", "settings", "scales"),
    [
        ("LlamaForCausalLM", {}, {"routed": 1.0}),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(kind="granular", granularity=2)}, {"routed": 2.0}),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(kind="split")}, {"routed": 4.0}),
        # which a sigmoid of zero halves
        (
            "LlamaForCausalLM",
            {"shared_expert": "half"},
            {"routed": 0.5, "shared": 1.0},
        ),
        ("LlamaForCausalLM", {"shared_expert": "zero"}, {"routed": 1.0}),
        (
            "LlamaForCausalLM",
            {"shared_expert": "half", "experts": ExpertsConfig(kind="split")},
            {"routed": 2.0, "shared": 1.0},
        ),
        ("GraniteForCausalLM", {"shared_expert": "half"}, {"routed": 0.5, "shared": 0.5}),
        (T5, TOP_1, {"routed": 4.0}),  # a tie of four gives each the probability of one quarter
    ],
)
def test_down_projections_are_scaled_by_what_the_router_leaves_of_them(
    architecture: str, settings: dict[str, Any], scales: dict[str, float], make_dense: MakeDense
) -> None:
    parts = [
        piece for write in plan(make_dense(architecture=architecture), **settings).writes for piece in write.pieces
    ]
    wide = [part for part in parts if isinstance(part, ExpertPart) and part.num_neurons > 0]
    found = {("routed" if part.routed else "shared", part.scale) for part in wide if part.neuron_axis == 1}
    assert found == set(scales.items())
    assert {part.scale for part in wide if part.neuron_axis == 0} == {1.0}


# Numbers

# Hidden 32, FFN 48, two layers, four heads of 8, two of them for keys and values, 300 tokens, tied.
OUTSIDE = 300 * 32 + 32
LAYER = (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32) + (32 + 32)
FFN = 3 * 32 * 48
# T5: hidden 32, FFN 64, four heads of 8, four layers and two; position buckets in the first layer of each stack.
T5_ATTENTION, T5_FFN = 4 * 32 * 32 + 32, 2 * 32 * 64
T5_OUTSIDE = 300 * 32 + 2 * 32 + 2 * 32 * 4 + 4 * T5_ATTENTION + 2 * 2 * T5_ATTENTION + 6 * 32


@pytest.mark.parametrize(
    ("architecture", "settings", "outside", "expert", "count", "k"),
    [
        (
            "LlamaForCausalLM",
            {"num_experts": 5, "num_experts_per_tok": 1},
            OUTSIDE + 2 * (LAYER + 5 * 32),
            2 * FFN,
            5,
            1,
        ),
        ("LlamaForCausalLM", {"num_experts": 5}, OUTSIDE + 2 * (LAYER + 5 * 32), 2 * FFN, 5, 2),
        (
            "LlamaForCausalLM",
            {"num_experts": 5, "num_experts_per_tok": 5},
            OUTSIDE + 2 * (LAYER + 5 * 32),
            2 * FFN,
            5,
            5,
        ),
        ("LlamaForCausalLM", {"layers": (1,)}, OUTSIDE + 2 * LAYER + FFN + 4 * 32 + 32, FFN, 4, 2),
        ("LlamaForCausalLM", {"shared_expert": "half"}, OUTSIDE + 2 * (LAYER + 4 * 32 + FFN + 32), 2 * FFN, 4, 2),
        (
            "LlamaForCausalLM",
            {"shared_expert": "zero", "layers": (0,)},
            OUTSIDE + 2 * (LAYER + FFN) + 4 * 32 + 32,
            FFN,
            4,
            2,
        ),
        ("GraniteForCausalLM", {}, OUTSIDE + 2 * (LAYER + 4 * 32), 2 * FFN, 4, 2),
        ("GraniteForCausalLM", {"shared_expert": "zero"}, OUTSIDE + 2 * (LAYER + 4 * 32 + FFN), 2 * FFN, 4, 2),
        (
            "LlamaForCausalLM",
            {"num_experts": 8, "num_experts_per_tok": 4, "experts": ExpertsConfig(kind="granular", granularity=2)},
            OUTSIDE + 2 * (LAYER + 8 * 32),
            2 * FFN // 2,
            8,
            4,
        ),
        (
            "LlamaForCausalLM",
            {"experts": ExpertsConfig(kind="split"), "num_experts_per_tok": 3},
            OUTSIDE + 2 * (LAYER + 4 * 32),
            2 * FFN // 4,
            4,
            3,
        ),
        (T5, TOP_1, T5_OUTSIDE + 6 * 4 * 32, 6 * T5_FFN, 4, 1),
        (T5, TOP_1 | {"layers": "every-2"}, T5_OUTSIDE + 3 * T5_FFN + 3 * 4 * 32, 3 * T5_FFN, 4, 1),
    ],
)
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(
    architecture: str, settings: dict[str, Any], outside: int, expert: int, count: int, k: int, make_dense: MakeDense
) -> None:
    found = plan(make_dense(architecture=architecture), **settings)
    assert found.num_active_parameters == outside + k * expert
    assert found.num_parameters == outside + count * expert


@pytest.mark.parametrize(
    ("architecture", "settings", "layers", "sites"),
    [
        ("LlamaForCausalLM", {}, 3, [(0, 0), (0, 1), (0, 2)]),
        ("LlamaForCausalLM", {"layers": (2, 0)}, 3, [(0, 0), (0, 2)]),
        (T5, {"layers": "every-2", **TOP_1}, 6, [(0, 1), (0, 3), (1, 1)]),
    ],
)
def test_sites_are_numbered_in_the_order_of_the_model(
    architecture: str, settings: dict[str, Any], layers: int, sites: list[tuple[int, int]], make_dense: MakeDense
) -> None:
    found = plan(
        make_dense(architecture=architecture, **({} if architecture == T5 else {"num_hidden_layers": 3})), **settings
    )
    assert [(site.stack, site.layer) for site in found.sites] == sites
    assert found.num_layers == layers
    assert [piece.site for write in found.writes for piece in write.pieces if isinstance(piece, RouterRows)] == list(
        range(len(sites))
    )


@pytest.mark.parametrize(
    ("architecture", "settings", "always", "at_zero", "bitwise"),
    [
        ("LlamaForCausalLM", {}, True, True, True),
        ("LlamaForCausalLM", TOP_1, True, True, True),
        ("LlamaForCausalLM", {"num_experts_per_tok": 3}, True, True, False),  # thirds do not add up to one in binary
        ("LlamaForCausalLM", {"experts": ExpertsConfig(noise=0.1)}, False, False, False),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(drop=0.5)}, False, False, False),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(kind="granular", granularity=2)}, True, False, False),
        (
            "LlamaForCausalLM",
            {"experts": ExpertsConfig(kind="granular", granularity=2), "num_experts_per_tok": 4},
            True,
            True,
            False,
        ),
        (
            "LlamaForCausalLM",
            {"experts": ExpertsConfig(kind="granular", granularity=2, noise=0.1)},
            False,
            False,
            False,
        ),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(kind="split")}, False, False, False),
        ("LlamaForCausalLM", {"experts": ExpertsConfig(kind="split"), "num_experts_per_tok": 4}, False, True, False),
        ("LlamaForCausalLM", {"shared_expert": "half"}, True, True, False),
        ("LlamaForCausalLM", {"shared_expert": "zero"}, True, True, True),
        ("LlamaForCausalLM", {"shared_expert": "zero", "experts": ExpertsConfig(drop=0.1)}, False, False, False),
        ("GemmaForCausalLM", {}, True, True, False),  # what is folded is rounded otherwise
        (T5, TOP_1, False, True, False),  # the output is multiplied by a probability
        (T5, {**TOP_1, "experts": ExpertsConfig(noise=0.1)}, False, False, False),
    ],
)
def test_what_is_promised_of_the_function(
    architecture: str, settings: dict[str, Any], always: bool, at_zero: bool, bitwise: bool, make_dense: MakeDense
) -> None:
    found = plan(make_dense(architecture=architecture), **settings)
    assert (found.keeps_function, found.keeps_function_at_zero, found.bitwise_at_zero) == (always, at_zero, bitwise)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("all", 1, (0,)),
        ("last-half", 4, (2, 3)),
        ("last-half", 5, (2, 3, 4)),
        ("last-half", 1, (0,)),
        ("every-1", 3, (0, 1, 2)),
        ("every-2", 5, (1, 3)),
        ("every-3", 3, (2,)),
        ((4, 0, 2), 5, (0, 2, 4)),
    ],
)
def test_layers_are_resolved_to_numbers_in_order(
    layers: str | tuple[int, ...], num_layers: int, expected: tuple[int, ...]
) -> None:
    assert resolve_layers(layers, num_layers) == expected


@pytest.mark.parametrize(
    ("layers", "named"),
    [((0, 2), "layer 2"), ((1, 99, 0), "layer 99"), ("every-3", "every-3")],
)
def test_layers_beyond_the_last_are_refused(
    layers: str | tuple[int, ...], named: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    assert refusal(dense_checkpoint, tmp_path, layers=layers) == (
        f"upcycle.layers: {named} is not in a model of 2 layers; must be of 0 to 1"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts": 5, "experts": ExpertsConfig(kind="split")},
            "a multiple of 5 to be cut into so many split experts",
        ),
        (
            {"num_experts": 10, "num_experts_per_tok": 5, "experts": ExpertsConfig(kind="granular", granularity=5)},
            "a multiple of 5 to be cut into so many granular experts",
        ),
    ],
)
def test_a_width_that_does_not_divide_is_refused(
    settings: dict[str, Any], message: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    assert (
        refusal(dense_checkpoint, tmp_path, **settings)
        == f"{dense_checkpoint}: the FFN's width is 48; it must be {message}"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3; it must be at most num_experts, which is 2",
        ),
        (
            {"num_experts": 5, "experts": ExpertsConfig(kind="granular", granularity=2)},
            "num_experts is 5; it must be a multiple of experts.granularity, which is 2",
        ),
        (
            {"num_experts": 6, "num_experts_per_tok": 3, "experts": ExpertsConfig(kind="granular", granularity=2)},
            "num_experts_per_tok is 3; it must be a multiple of experts.granularity, which is 2",
        ),
        (
            {"experts": ExpertsConfig(kind="granular", granularity=2), "router": RouterConfig(logit_std=0.0)},
            "router.logit_std is 0; it must be greater with granular experts, or a tie of all chooses parts of "
            "different copies",
        ),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_before_any_model_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as excinfo:
        UpcycleConfig(**settings)
    assert [error["msg"] for error in excinfo.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize(
    ("layers", "stack", "chosen"),
    [
        ("last-half", "encoder", [2, 3]),
        ((0,), "encoder", [0]),
        ((0, 1, 3), "encoder", [0, 1, 3]),
        ((1, 3), "decoder", [1, 3]),
    ],
)
def test_layers_that_switch_transformers_cannot_count_are_refused(
    layers: Any, stack: str, chosen: list[int], make_dense: MakeDense, tmp_path: Path
) -> None:
    directory = make_dense(architecture=T5, num_decoder_layers=6)
    assert refusal(directory, tmp_path, layers=layers, **TOP_1) == (
        f"upcycle.layers: SwitchTransformersForConditionalGeneration cannot have experts in the {stack}'s layers "
        f"{chosen} alone; use all or every-2"
    )


@pytest.mark.parametrize("layers", ["all", "every-1", "every-2"])
@pytest.mark.parametrize(("encoder", "decoder"), [(2, 3), (4, 5), (6, 7)])
def test_all_layers_and_every_second_are_what_switch_transformers_builds(
    layers: str, encoder: int, decoder: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    found = plan(make_dense(architecture=T5, num_layers=encoder, num_decoder_layers=decoder), layers=layers, **TOP_1)
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(found.target_config)
    for number, stack in enumerate((model.encoder, model.decoder)):
        assert [site.layer for site in found.sites if site.stack == number] == [
            n for n, block in enumerate(stack.block) if block.is_sparse
        ]


# The config


@every_conversion
def test_every_value_survives_to_the_reloaded_target(row: Conversion, dense_of: MakeDense, tmp_path: Path) -> None:
    source = talkative(row)
    directory = dense_of(row, source)
    dense = AutoConfig.from_pretrained(directory)
    k = 1 if row.experts.top_1 else 3
    plan(directory, target=row.target.model_type, num_experts=6, num_experts_per_tok=k).target_config.save_pretrained(
        tmp_path
    )
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.model_type == row.target.model_type
    carried = (*row.carried, *row.optional)
    assert {name: getattr(found, name) for name in carried} == {name: getattr(dense, name) for name in carried}
    for name in source.keys() & set(carried):  # and none of them is a default that was never carried
        assert getattr(found, name) == source[name] != getattr(type(found)(), name, None)
    assert {name: getattr(found, name) for name in DERIVED[name_of(row)]} == DERIVED[name_of(row)]
    width = {"t5": 64}.get(row.family.model_type, 48)
    assert (getattr(found, row.experts.count_field), getattr(found, row.experts.width_field)) == (6, width)
    assert row.experts.top_1 or found.num_experts_per_tok == 3
    assert found.dtype == dense.dtype == torch.float32


def rotations(architecture: str, config: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a model's rotary embedding at the first `length` positions."""
    modeling = sys.modules[getattr(transformers, architecture).__module__]
    embedding = getattr(modeling, f"{architecture.removesuffix('ForCausalLM')}RotaryEmbedding")(config)
    return embedding(torch.zeros(1), torch.arange(length)[None])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "row", [row for row in CONVERSIONS if row.family.model_type not in ("phi3", "t5")], ids=name_of
)
def test_rotary_embeddings_of_every_kind_are_those_of_the_dense_model(
    rope: str, row: Conversion, dense_of: MakeDense, tmp_path: Path
) -> None:
    directory = dense_of(row, {"rope_parameters": ROPES[rope], "head_dim": 8})
    plan(directory, target=row.target.model_type).target_config.save_pretrained(tmp_path)
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
    dense = make_dense(dtype, architecture=row.family.architecture, **silence(row))
    found = plan(dense, target=row.target.model_type, **(TOP_1 if row.experts.top_1 else {}))
    assert found.target_config.dtype == dtype
    biases = {
        write.spec.name: write.spec.dtype
        for write in found.writes
        if write.spec.name.endswith("e_score_correction_bias")
    }
    assert set(biases.values()) <= {torch.float32}
    folded = {write.spec.name for write in found.writes if write.spec.dtype != dtype} - set(biases)
    norms = {
        "model.norm.weight",
        *(f"model.layers.{n}.{name}_layernorm.weight" for n in (0, 1) for name in ("input", "post_attention")),
    }
    gemma = row.family.model_type == "gemma" and dtype != torch.float32
    assert folded == ({"model.embed_tokens.weight", *norms} if gemma else set())
    assert {write.spec.dtype for write in found.writes} <= {dtype, torch.float32}


# Refused before anything is written


def test_a_value_that_no_target_holds_is_refused_with_the_files_name(make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(mlp_bias=True)
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: mlp_bias is True; MixtralForCausalLM needs False: no mixture-of-experts "
        "architecture of transformers has "
        "expert biases with this FFN (the nearest target is mixtral)"
    )


def test_a_gated_t5_is_refused_with_the_files_name(make_dense: MakeDense, tmp_path: Path) -> None:
    directory = make_dense(architecture=T5, feed_forward_proj="gated-gelu")
    assert refusal(directory, tmp_path, **TOP_1) == (
        f"{directory / 'config.json'}: feed_forward_proj is gated-gelu; SwitchTransformersForConditionalGeneration "
        "needs one without a gate"
    )


def test_a_family_without_a_twin_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    directory = edited(
        dense_checkpoint, tmp_path / "dense", {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    )
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: Gemma2ForCausalLM (gemma2) has soft caps on attention scores and logits, and "
        "norms on both sides of the FFN; "
        "no mixture-of-experts architecture of transformers holds that; the nearest target is mixtral"
    )


def test_a_field_that_nobody_classified_is_refused_unless_it_has_its_default(
    make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = tuple(name for name in CONVERSIONS[0].carried if name != "rms_norm_eps")
    monkeypatch.setattr(
        "dense2moe.upcycle.building.choice.CONVERSIONS", (Conversion(**{**vars(CONVERSIONS[0]), "carried": without}),)
    )
    assert plan(make_dense(rms_norm_eps=transformers.LlamaConfig().rms_norm_eps)).target_config.num_local_experts == 4
    directory = make_dense(rms_norm_eps=0.5)
    assert refusal(directory, tmp_path) == (
        f"{directory / 'config.json'}: rms_norm_eps is 0.5, and what it does is not known to MixtralForCausalLM; "
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
    assert (
        refusal(directory, tmp_path)
        == f"{directory}: tensor '{name}' is stored as {stored}; it must be one of F32, F16, BF16{hint}"
    )


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
        "there, so that decoding differs from reading at once; remove the field"
    )
    (directory / "config.json").write_text(json.dumps(config | {field: None}))
    plan_upcycle(open_checkpoint(directory), UpcycleConfig())
