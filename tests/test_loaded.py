"""A written mixture loads whole or not at all, and its routers are found in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from receipts import (
    DECODERS,
    EXACT,
    EXPERT,
    LEFT_OVER,
    MISSING,
    T5,
    MakeDense,
    make_mixture,
    rewrite,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.checkpoints.loaded import (
    load_model,
    router_modules,
    router_weights,
    selection_biases,
    sparse_layers,
)
from dense2moe.upcycle.errors import UpcycleError

# Loading


def test_a_written_mixture_loads_without_a_key_missing_or_left_over(mixture_checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(mixture_checkpoint, output_loading_info=True)
    assert {kind: set(found) for kind, found in info.items() if found} == {}
    assert type(model).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), MISSING.format("tensor 'model.norm.weight'")),
        (lambda state: state.update({"extra.weight": torch.ones(1)}), LEFT_OVER.format("tensor 'extra.weight'")),
        (
            lambda state: [state.pop(name) for name in list(state) if "norm" in name],
            MISSING.format(
                "tensors 'model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight', "
                "'model.layers.1.input_layernorm.weight' and 2 more"
            ),
        ),
    ],
)
def test_what_transformers_only_warns_about_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "dense"
    shutil.copytree(dense_checkpoint, directory)
    rewrite(directory, change)
    with pytest.raises(UpcycleError) as excinfo:
        load_model(directory, torch.float32)
    assert str(excinfo.value) == f"{directory}: {message}"


def test_a_mixture_that_lacks_one_experts_matrix_is_refused(mixture_checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mixture"
    shutil.copytree(mixture_checkpoint, directory)
    rewrite(directory, lambda state: state.pop(EXPERT.format(layer=1, expert=3, matrix="w2")))
    with pytest.raises(UpcycleError) as excinfo:
        load_model(directory, torch.float32)
    shapes = "of shape [3, 32, 48]; by config.json it must be [4, 32, 48]; correct one of the two"
    assert str(excinfo.value) == f"{directory}: tensor 'model.layers.1.mlp.experts.down_proj' {shapes}"


def test_a_model_is_loaded_with_the_head_of_its_task(make_dense: MakeDense, dense_checkpoint: Path) -> None:
    assert type(load_model(dense_checkpoint, torch.bfloat16)).__name__ == "LlamaForCausalLM"
    assert type(load_model(make_dense(architecture=T5), torch.float32, "text2text-generation")).__name__ == T5


def test_router_weights_are_found_in_order(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    state = load_file(mixture_checkpoint / "model.safetensors")
    found = list(router_weights(load_model(mixture_checkpoint, torch.float32)))
    assert len(found) == 2
    assert all(
        torch.equal(weight, state[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
        for layer, weight in enumerate(found)
    )
    assert list(router_weights(load_model(dense_checkpoint, torch.float32))) == []


@pytest.mark.parametrize("name", DECODERS)
def test_every_targets_routers_and_their_layers_are_found(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, **overrides)
    model = load_model(mixture, torch.float32)
    assert sparse_layers(model) == tuple(site.layer for site in plan.sites)
    assert len(list(router_modules(model))) == len(plan.sites)
    written = [tensor for tensor in load_file(mixture / "model.safetensors").values() if tensor.shape == (4, 32)]
    assert all(torch.equal(weight, tensor) for weight, tensor in zip(router_weights(model), written, strict=True))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama to glm4_moe", "mlp.gate.e_score_correction_bias"),
        ("ernie4.5", "mlp.gate.moe_statics.e_score_correction_bias"),
        ("lfm2", "feed_forward.expert_bias"),
    ],
)
def test_selection_biases_are_the_models_own(name: str, tensor: str, make_dense: MakeDense, tmp_path: Path) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, **overrides)
    model = load_model(mixture, torch.float32)
    biases = list(selection_biases(model))
    assert [bias.shape for bias in biases if bias is not None] == [(4,)] * len(plan.sites)
    for site, bias in zip(plan.sites, biases, strict=True):
        assert bias is not None
        bias.add_(torch.arange(4))
        assert model.state_dict()[f"model.layers.{site.layer}.{tensor}"].flatten().tolist() == [0, 1, 2, 3]


def test_the_routers_of_switch_are_found_in_both_stacks(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(architecture=T5), tmp_path / "mixture"
    make_mixture(dense, mixture, k=1, layers="every-2")
    state = load_file(mixture / "model.safetensors")
    names = [f"encoder.block.{layer}.layer.1" for layer in (1, 3)] + ["decoder.block.1.layer.2"]
    found = list(router_weights(load_model(mixture, torch.float32, "text2text-generation")))
    assert all(
        torch.equal(weight, state[f"{name}.mlp.router.classifier.weight"])
        for weight, name in zip(found, names, strict=True)
    )
