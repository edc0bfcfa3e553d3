"""Noise and redrawn neurons are of each expert by itself, relative to the weight, and from the seed alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    EXACT,
    HIDDEN,
    LAYER,
    STORED,
    T5,
    WIDTH,
    MakeDense,
    dense_ffn,
    experts,
    make,
    quiet,
    settings,
    shift,
)

from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints import tensors

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

# Noise


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_every_expert_has_noise_of_its_own_relative_to_the_weights_deviation(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, _ = make(name, make_dense, tmp_path, noise=0.5)
    noises = []
    for expert in experts(tmp_path, LAYER):
        for (found, _), (weight, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True):
            # 2048 draws: the standard error of the deviation is 1.6 %; twelve of them lie within four of it.
            assert float((found - weight).std()) == pytest.approx(0.5 * float(weight.std()), rel=0.065)
            noises.append((found - weight).flatten())
    assert len(noises) == 4 * (2 if name in T5 else 3)
    for one, other in combinations(noises, 2):
        # Correlation of 2048 independent pairs has deviation .022; equal draws would have 1.
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.12


def test_no_two_matrices_of_a_checkpoint_have_the_same_noise(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    noises = []
    for layer in range(2):
        weights = dense_ffn(dense_checkpoint, layer).list()
        for expert in experts(mixture_checkpoint, layer):
            noises += [
                (found - weight).flatten() / weight.std()
                for (found, _), (weight, _) in zip(expert.list(), weights, strict=True)
            ]
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert len(noises) == 2 * 4 * 3
    # of 1536 independent pairs each; the deviation is .026, and there are 276 of them
    assert float(correlations.abs().max()) < 0.15


def test_the_seed_alone_decides_what_is_drawn(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = settings(noise=0.1, drop=0.25, logit_std=1.0)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))  # the global generator has no part in it
            upcycle(dense_checkpoint, tmp_path / name, config, seed, quiet)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_what_is_drawn_for_a_tensor_depends_on_no_other_tensor(make_dense: MakeDense, tmp_path: Path) -> None:
    """So the order of writing changes nothing."""
    noises = {}
    for name, num_layers, num_experts in (("small", 1, 3), ("large", 3, 6)):
        (tmp_path / name).mkdir()
        dense = make_dense(num_hidden_layers=num_layers)
        upcycle(dense, tmp_path / name, settings(num_experts=num_experts, noise=0.1), 0, quiet)
        gate = dense_ffn(dense, 0).gate
        noises[name] = torch.stack(
            [(expert.gate - gate) / gate.std(correction=0) for expert in experts(tmp_path / name, 0, 3)]
        )
    # two sums of different weights round differently
    assert torch.allclose(noises["small"], noises["large"], atol=1e-5)


# Dropped neurons


def changed(found: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Which neurons have any other bit than the dense model's."""
    return (found != weight).any(1 - axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*STORED, *T5])
def test_one_set_of_neurons_is_drawn_anew_in_gate_up_and_down_and_no_other_bit_changes(
    name: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(name, make_dense, tmp_path, dtype, drop=0.25)
    assert not plan.keeps_function
    assert not plan.keeps_function_at_zero
    sets = []
    for expert in experts(tmp_path, LAYER):
        pairs = [
            (found, weight, axis)
            for (found, axis), (weight, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True)
        ]
        masks = [changed(*pair) for pair in pairs]
        assert [int(mask.sum()) for mask in masks] == [WIDTH // 4] * len(masks)
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        sets.append(masks[0])
    for one, other in combinations(sets, 2):
        assert not torch.equal(one, other)  # of 5e14 sets


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_a_weight_that_passes_in_chunks_is_changed_as_one(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 5 * HIDDEN)  # five rows of gate and up, two of down
    dense, _ = make(name, make_dense, tmp_path, drop=0.25, noise=0.0)
    (tmp_path / "noisy").mkdir()
    make(name, make_dense, tmp_path / "noisy", noise=0.5)
    ffn = dense_ffn(dense, LAYER).list()
    for expert, noisy in zip(experts(tmp_path, LAYER), experts(tmp_path / "noisy", LAYER), strict=True):
        masks = [changed(found, weight, axis) for (found, axis), (weight, _) in zip(expert.list(), ffn, strict=True)]
        assert int(masks[0].sum()) == WIDTH // 4
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        for (found, _), (weight, _) in zip(noisy.list(), ffn, strict=True):
            assert float((found - weight).std()) == pytest.approx(0.5 * float(weight.std()), rel=0.065)  # as above


@pytest.mark.parametrize(
    ("dense_fields", "overrides"),
    [
        ({"architecture": "GemmaForCausalLM"}, {}),
        (
            {"architecture": "Phi3ForCausalLM"},
            {"num_experts": 8, "k": 4, "logit_std": 1.0, "kind": "granular", "granularity": 4},
        ),
        ({"attention_bias": True}, {"num_experts": 4, "k": 4, "kind": "split", "shared_expert": "half"}),
    ],
)
def test_chunks_change_no_bit_of_what_is_not_drawn_by_them(
    dense_fields: dict[str, Any],
    overrides: dict[str, Any],
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = make_dense(**EXACT, **dense_fields)
    for name in ("whole", "chunks"):
        (tmp_path / name).mkdir()
        upcycle(dense, tmp_path / name, settings(**overrides), 0, quiet)
        monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 5 * HIDDEN)
    whole, chunks = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "chunks"))
    assert whole == chunks


def test_every_layer_has_sets_of_its_own(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral", make_dense, tmp_path, drop=0.5)
    sets = [
        changed(expert.up, dense_ffn(dense, layer).up, 0) for layer in range(2) for expert in experts(tmp_path, layer)
    ]
    assert all(not torch.equal(one, other) for one, other in combinations(sets, 2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_neurons_is_the_one_asked_for(share: float, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral", make_dense, tmp_path, drop=share)
    for expert in experts(tmp_path, LAYER):
        assert int(changed(expert.up, dense_ffn(dense, LAYER).up, 0).sum()) == round(share * WIDTH)


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_neurons_drawn_anew_have_the_mean_and_deviation_of_the_weight(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense_fields, upcycle_fields = (STORED | T5)[name]
    dense = make_dense(**({} if name in T5 else EXACT) | dense_fields)
    shift(dense, 2.0)
    upcycle(dense, tmp_path, settings(16, **upcycle_fields | {"drop": 0.5}), 0, quiet)
    weights = dense_ffn(dense, LAYER).list()
    for number, (weight, axis) in enumerate(weights):
        drawn = []
        for expert in experts(tmp_path, LAYER, 16):
            found = expert.list()[number][0]
            mask = changed(found, weight, axis)
            drawn.append((found[mask] if axis == 0 else found[:, mask]).flatten())
        values = torch.cat(drawn)
        # 16384 draws: the standard errors are .8 % of the deviation for the mean and .55 % of it for the deviation.
        assert len(values) == 16 * WIDTH // 2 * HIDDEN
        assert float(values.mean()) == pytest.approx(float(weight.mean()), abs=0.04 * float(weight.std()))
        assert float(values.std()) == pytest.approx(float(weight.std()), rel=0.03)
