"""The plan is what transformers' own target would save, and uses every weight of the dense model once."""

from __future__ import annotations

import re
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
    once_of_each,
    plan,
    plans,
)
from safetensors import safe_open
from safetensors.torch import load_file

from dense2moe.upcycle.building.config import ExpertsConfig
from dense2moe.upcycle.building.pieces import ExpertPart, Keep, RouterRows, SelectionBias, Write, Zeros
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.models.architecture import Conversion

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]


@pytest.fixture(scope="module")
def dense_of(make_dense: MakeDense) -> MakeDense:
    """Checkpoints by what is asked of them, each made once. Read only."""
    return once_of_each(make_dense)


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
    # a selection bias is no parameter of ours, whether transformers calls it one or a buffer
    counted = (p for name, p in model.named_parameters() if not name.endswith(SELECTION_BIASES))
    assert found.num_parameters == sum(map(torch.numel, counted))
    biases = [write.spec.shape[-1] for write in found.writes if write.spec.name.endswith(SELECTION_BIASES)]
    assert len(biases) == (len(found.sites) if SPARSE[row.target.model_type].biased else 0)
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
        if sparse and re.search(r"\.mlp\.|DenseReluDense|feed_forward", name):
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
