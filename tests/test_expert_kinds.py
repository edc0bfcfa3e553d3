"""Granular, split and shared experts, in all layers or some, are the neurons that they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    EXACT,
    FFN,
    HIDDEN,
    LAYER,
    MATRICES,
    STORED,
    WIDTH,
    MakeDense,
    dense_ffn,
    experts,
    logits,
    make,
    quiet,
    rel,
    settings,
    shift,
)
from safetensors.torch import load_file

from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT, rounding_limit
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

# Granular experts


@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize("name", STORED)
def test_granular_experts_of_a_drawn_router_are_the_dense_model(
    name: str, granularity: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(
        name, make_dense, tmp_path, num_experts=8, k=4, logit_std=1.0, kind="granular", granularity=granularity
    )
    assert plan.keeps_function
    # a tie of all may choose the first part of one copy and the second of another
    assert not plan.keeps_function_at_zero
    assert rounding_limit(plan, open_checkpoint(dense)) == ROUNDING_LIMIT  # powers of two round nothing
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize("name", STORED)
def test_a_group_of_granular_experts_is_one_copy_cut_by_neurons(
    name: str, granularity: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(
        name, make_dense, tmp_path, num_experts=8, k=4, logit_std=1.0, kind="granular", granularity=granularity
    )
    ffn, found = dense_ffn(dense, LAYER), experts(tmp_path, LAYER, 8)
    assert {tuple(expert.up.shape) for expert in found} == {(WIDTH // granularity, HIDDEN)}
    assert getattr(plan.target_config, plan.conversion.experts.width_field) == WIDTH // granularity
    for copy in range(0, 8, granularity):
        parts = found[copy : copy + granularity]
        assert torch.equal(torch.cat([part.gate for part in parts]), ffn.gate)
        assert torch.equal(torch.cat([part.up for part in parts]), ffn.up)
        assert torch.equal(torch.cat([part.down for part in parts], 1), ffn.down * granularity)
    router = next(
        tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if f"layers.{LAYER}." in key and is_router(key)
    )
    rows = router.reshape(8 // granularity, granularity, HIDDEN)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len({tuple(row.tolist()) for row in router}) == 8 // granularity


def is_router(name: str) -> bool:
    return name.endswith(
        ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.layer.weight", "router.classifier.weight")
    )


def test_all_parts_of_all_copies_with_a_zero_router_are_the_dense_model(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = make("mixtral", make_dense, tmp_path, num_experts=4, k=4, kind="granular", granularity=2)
    assert plan.keeps_function_at_zero
    assert not plan.bitwise_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


def test_a_scale_that_is_no_power_of_two_is_rounded_to_the_sources_dtype_and_judged_by_it(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(torch.bfloat16, intermediate_size=96)
    plan = upcycle(dense, tmp_path, settings(6, 3, logit_std=1.0, kind="granular", granularity=3), 0, quiet)
    down = dense_ffn(dense, LAYER).down
    for number, expert in enumerate(experts(tmp_path, LAYER, 6)):
        part = down[:, number % 3 * 32 : (number % 3 + 1) * 32]
        assert torch.equal(expert.down, (part.float() * 3).to(torch.bfloat16))
    eps = torch.finfo(torch.bfloat16).eps
    assert rounding_limit(plan, open_checkpoint(dense)) == 10 * eps
    # A weight is off by half an eps at most; two layers add such errors up, of many weights with either sign. Measured:
    # .5 eps.
    assert ROUNDING_LIMIT < rel(logits(tmp_path), logits(dense)) <= 2 * eps


# Split experts


@pytest.mark.parametrize("name", STORED)
def test_all_the_parts_of_one_ffn_with_a_zero_router_are_the_dense_model(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(name, make_dense, tmp_path, num_experts=4, k=4, kind="split")
    assert plan.keeps_function_at_zero
    assert not plan.keeps_function
    assert not plan.bitwise_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("name", STORED)
def test_split_experts_partition_the_neurons(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = make(name, make_dense, tmp_path, num_experts=4, k=2, kind="split")
    assert not plan.keeps_function_at_zero  # with two of four there is half of the FFN
    ffn, found = dense_ffn(dense, LAYER), experts(tmp_path, LAYER)
    assert torch.equal(torch.cat([expert.gate for expert in found]), ffn.gate)
    assert torch.equal(torch.cat([expert.up for expert in found]), ffn.up)
    assert torch.equal(torch.cat([expert.down for expert in found], 1), ffn.down * 4)
    assert rel(logits(tmp_path), logits(dense)) > 1000 * ROUNDING_LIMIT


# Shared experts


@pytest.mark.parametrize("kind", ["half", "zero", "none"])
def test_the_shared_expert_of_qwen2_moe(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("qwen2_moe", make_dense, tmp_path, shared_expert=kind, layers="all")
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.mlp"
    gate, up, down = (state[f"{mlp}.shared_expert.{matrix}_proj.weight"] for matrix in ("gate", "up", "down"))
    assert torch.equal(state[f"{mlp}.shared_expert_gate.weight"], torch.zeros(1, HIDDEN))  # whose sigmoid is one half
    width = 0 if kind == "none" else WIDTH
    assert torch.equal(gate, ffn.gate[:width])
    assert torch.equal(up, ffn.up[:width])
    assert torch.equal(
        down, {"half": ffn.down, "zero": torch.zeros(HIDDEN, WIDTH), "none": torch.empty(HIDDEN, 0)}[kind]
    )
    assert all(
        torch.equal(expert.down, ffn.down / 2 if kind == "half" else ffn.down) for expert in experts(tmp_path, LAYER)
    )
    assert json.loads((tmp_path / "config.json").read_text())["shared_expert_intermediate_size"] == width


@pytest.mark.parametrize("kind", ["half", "zero", "none"])
def test_the_shared_expert_of_glm4_moe_is_counted_in_experts(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make(
        "glm4_moe",
        make_dense,
        tmp_path,
        shared_expert=kind,
        kind="granular",
        granularity=2,
        num_experts=4,
        k=2,
        logit_std=1.0,
    )
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.mlp.shared_experts"
    gate, up, down = (state[f"{mlp}.{matrix}_proj.weight"] for matrix in ("gate", "up", "down"))
    width = 0 if kind == "none" else WIDTH
    assert torch.equal(gate, ffn.gate[:width])
    assert torch.equal(up, ffn.up[:width])
    assert torch.equal(
        down, {"half": ffn.down / 2, "zero": torch.zeros(HIDDEN, WIDTH), "none": torch.empty(HIDDEN, 0)}[kind]
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_shared_experts"], config["moe_intermediate_size"]) == (0 if kind == "none" else 2, WIDTH // 2)


def test_a_selection_bias_starts_at_zero_in_float32(make_dense: MakeDense, tmp_path: Path) -> None:
    make("glm4_moe", make_dense, tmp_path, torch.bfloat16)
    bias = load_file(tmp_path / "model.safetensors")[f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", ["half", "zero"])
def test_the_shared_expert_of_granitemoeshared(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**EXACT, attention_bias=True)
    plan = upcycle(dense, tmp_path, settings(shared_expert=kind), 0, quiet)
    assert plan.conversion.target.model_type == "granitemoeshared"
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.shared_mlp"
    assert torch.equal(state[f"{mlp}.input_linear.weight"], torch.cat([ffn.gate, ffn.up]))
    assert torch.equal(
        state[f"{mlp}.output_linear.weight"], ffn.down / 2 if kind == "half" else torch.zeros(HIDDEN, WIDTH)
    )
    assert all(
        torch.equal(expert.down, ffn.down / 2 if kind == "half" else ffn.down) for expert in experts(tmp_path, LAYER)
    )


def test_a_shared_expert_keeps_its_bits_where_routed_ones_are_changed(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("qwen2_moe", make_dense, tmp_path, shared_expert="half", noise=0.5, drop=0.5)
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    for matrix, expected in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
        assert torch.equal(state[f"model.layers.{LAYER}.mlp.shared_expert.{matrix}_proj.weight"], expected)
    assert not torch.equal(experts(tmp_path, LAYER)[0].up, ffn.up)


# Some layers


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [([2, 0], {0, 2}), ("every-2", {1, 3}), ("every-3", {2}), ("last-half", {2, 3}), ("all", {0, 1, 2, 3})],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"])
def test_layers_that_are_not_chosen_keep_their_ffn(
    architecture: str, layers: Any, chosen: set[int], make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(architecture=architecture, num_hidden_layers=4, **EXACT)
    target = "auto" if architecture == "Qwen3ForCausalLM" else "qwen2_moe"
    plan = upcycle(dense, tmp_path, settings(layers=layers, target=target), 0, quiet)
    state = load_file(tmp_path / "model.safetensors")
    assert {site.layer for site in plan.sites} == chosen
    for layer in range(4):
        if layer in chosen:
            assert f"model.layers.{layer}.mlp.gate.weight" in state
            assert f"model.layers.{layer}.mlp.up_proj.weight" not in state
        else:
            kept = {name: tensor for name, tensor in state.items() if name.startswith(f"model.layers.{layer}.mlp.")}
            ffn = dense_ffn(dense, layer)
            expected = {
                FFN.format(layer=layer, matrix=matrix): tensor
                for matrix, tensor in zip(MATRICES, (ffn.gate, ffn.up, ffn.down), strict=True)
            }
            assert kept.keys() == expected.keys()
            assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_layers_of_t5_that_are_not_chosen_keep_their_ffn_in_both_stacks(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(architecture="T5ForConditionalGeneration")
    upcycle(dense, tmp_path, settings(k=1, layers="every-2"), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for stack, number, layers in (("encoder", 1, range(4)), ("decoder", 2, range(2))):
        for layer in layers:
            mlp = f"{stack}.block.{layer}.layer.{number}"
            for matrix in ("wi", "wo"):
                weight = source[f"{mlp}.DenseReluDense.{matrix}.weight"]
                if layer % 2 == 0:
                    assert torch.equal(found[f"{mlp}.mlp.{matrix}.weight"], weight)
                else:  # a router that ties weighs one of four by a quarter
                    scale = 4 if matrix == "wo" else 1
                    assert torch.equal(found[f"{mlp}.mlp.experts.expert_3.{matrix}.weight"], weight * scale)


# Several at once


def test_noise_and_redrawing_of_parts_in_some_layers_are_relative_to_the_whole_weight(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(num_hidden_layers=4, **EXACT)
    shift(dense, 1.0)
    config = settings(8, 4, 1.0, layers=[3, 1], kind="granular", granularity=2, noise=0.1, drop=0.25)
    plan = upcycle(dense, tmp_path, config, 0, quiet)
    assert not plan.keeps_function
    for layer in (1, 3):
        ffn = dense_ffn(dense, layer)
        for number, expert in enumerate(experts(tmp_path, layer, 8)):
            part = slice(number % 2 * 32, (number % 2 + 1) * 32)
            weights = ((ffn.gate, ffn.gate[part]), (ffn.up, ffn.up[part]), (ffn.down, ffn.down[:, part]))
            chosen = []
            for (found, axis), (whole, weight) in zip(expert.list(), weights, strict=True):
                difference = (
                    found / 2 if axis == 1 else found
                ) - weight  # parts of two are chosen, so their output is doubled
                spread = (difference if axis == 0 else difference.T).std(1)
                redrawn = spread > 0.6 * whole.std()  # a redrawn neuron lies √2 deviations from the dense one, noise .1
                assert int(redrawn.sum()) == 8
                chosen.append(redrawn)
                # 24 · 32 draws: the standard error is 2.6 %; forty-eight of them lie within four of it.
                kept = difference[~redrawn] if axis == 0 else difference[:, ~redrawn]
                assert float(kept.std()) == pytest.approx(0.1 * float(whole.std()), rel=0.11)
            assert all(torch.equal(one, chosen[0]) for one in chosen)


def test_a_granular_mixture_of_some_layers_with_a_half_shared_keeps_the_function(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(num_hidden_layers=4, **EXACT)
    config = settings(8, 4, 1.0, layers="every-2", kind="granular", granularity=2, shared_expert="half")
    plan = upcycle(dense, tmp_path, config, 0, quiet)
    assert plan.keeps_function
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT
    down = dense_ffn(dense, 1).down
    assert torch.equal(experts(tmp_path, 1, 8)[0].down, down[:, :32])  # doubled for its part, halved for the share


def test_split_experts_with_a_half_shared_and_a_zero_router_keep_the_function(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**EXACT, attention_bias=True)
    plan = upcycle(dense, tmp_path, settings(4, 4, kind="split", shared_expert="half"), 0, quiet)
    assert plan.keeps_function_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT
