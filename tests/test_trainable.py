"""What learns is what is named, at the rate that is its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from told import tells
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.domains import domain_experts
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.trainable import (
    add_expert_dropout,
    choose_trainable,
    expert_parameters,
    parameter_groups,
    stacked_weights,
)
from tests.conftest import MakeDense

Load = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def mixture(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    upcycle(
        dense_checkpoint, directory, UpcycleConfig(num_experts=4, experts=ExpertsConfig(noise=0.1)), 0, lambda *_: None
    )
    return directory


def learning(directory: Path, **settings: Any) -> set[str]:
    model = load_model(directory, torch.float32)
    choose_trainable(model, FinetuneConfig(**settings), (0, 1))
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(directory: Path, pattern: str) -> set[str]:
    return {name for name, _ in load_model(directory, torch.float32).named_parameters() if re.search(pattern, name)}


@pytest.mark.parametrize(
    ("train", "of_mixture", "of_control"),
    [
        ("all", "", ""),
        ("experts", r"mlp\.", r"mlp\."),
        ("router", r"mlp\.gate\.weight", ""),  # the control has no routers: everything of it learns
        ("last-1", r"layers\.1\.|model\.norm|lm_head", r"layers\.1\.|model\.norm|lm_head"),
        ("last-2", r"layers\.|model\.norm|lm_head", r"layers\.|model\.norm|lm_head"),
    ],
)
def test_what_learns_is_what_is_named(
    train: str, of_mixture: str, of_control: str, mixture: Path, dense_checkpoint: Path
) -> None:
    assert learning(mixture, train=train) == names(mixture, of_mixture)
    assert learning(dense_checkpoint, train=train) == names(dense_checkpoint, of_control)


def test_experts_that_every_token_visits_learn_with_the_others(make_dense: MakeDense, tmp_path: Path) -> None:
    for number, architecture in enumerate(("LlamaForCausalLM", "GraniteForCausalLM")):
        directory = tmp_path / str(number)
        directory.mkdir()
        upcycle(
            make_dense(architecture=architecture),
            directory,
            UpcycleConfig(num_experts=4, shared_expert="half"),
            0,
            lambda *_: None,
        )
        learned = learning(directory, train="experts")
        assert learned == names(
            directory, r"\.experts\.|shared_expert\.|shared_mlp|(mlp\.gate|router|shared_expert_gate)\.weight"
        )
        assert any("shared" in name for name in learned)


def test_the_control_learns_the_ffns_of_the_layers_with_experts_alone(dense_checkpoint: Path) -> None:
    model = load_model(dense_checkpoint, torch.float32)
    assert {name for name, _ in expert_parameters(model, (1,))} == names(dense_checkpoint, r"layers\.1\.mlp\.")


def test_routers_do_not_learn_while_domains_choose_the_experts(mixture: Path) -> None:
    assert learning(mixture, train="experts", routing="by-domain") == names(mixture, r"mlp\.experts\.")


def test_more_last_layers_than_there_are_is_refused(mixture: Path) -> None:
    with pytest.raises(UpcycleError) as excinfo:
        learning(mixture, train="last-3")
    assert tells(str(excinfo.value), "finetune.train", "last-3", "last-2")


def test_every_group_has_its_own_rate_and_only_matrices_decay(mixture: Path) -> None:
    model = load_model(mixture, torch.float32)
    settings = FinetuneConfig(
        learning_rate=1e-3, expert_learning_rate=2e-3, router_learning_rate=3e-3, weight_decay=0.1
    )
    of = {id(p): group for group in parameter_groups(model, settings, (0, 1)) for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = 3e-3 if ".gate." in name else 2e-3 if ".experts." in name else 1e-3
        decay = 0.0 if ".gate." in name or parameter.ndim == 1 else 0.1
        assert (of[id(parameter)]["lr"], of[id(parameter)]["weight_decay"]) == (rate, decay), name


def test_rates_fall_from_layer_to_layer_below_the_head(mixture: Path) -> None:
    """Two layers: the last at 0.5, the first at 0.25, embeddings at 0.125; the norm and the head whole, and routers."""
    model = load_model(mixture, torch.float32)
    settings = FinetuneConfig(learning_rate=1e-3, expert_learning_rate=2e-3, router_learning_rate=3e-3, layer_decay=0.5)
    groups = parameter_groups(model, settings, (0, 1))
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    shares = {"model.embed": 0.125, "model.layers.0.": 0.25, "model.layers.1.": 0.5, "model.norm": 1.0, "lm_head": 1.0}
    for name, parameter in model.named_parameters():
        share = next(share for start, share in shares.items() if name.startswith(start))
        expected = 3e-3 if ".gate." in name else (2e-3 if ".experts." in name else 1e-3) * share
        assert of[id(parameter)] == pytest.approx(expected, rel=1e-12), name
    assert groups[0]["lr"] == 1e-3  # which is told as the rate


def test_rates_by_layer_reach_hosts_of_other_names() -> None:
    """ViT's patches and BERT's words are embeddings, a pooler and a classifier stand on the layers."""
    vit = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8))
    bert = BertForTokenClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    shares = {"embeddings.": 0.125, "layers.0.": 0.25, "layer.0.": 0.25, "layers.1.": 0.5, "layer.1.": 0.5}
    for model in (vit, bert):
        groups = parameter_groups(model, FinetuneConfig(learning_rate=1.0, layer_decay=0.5), ())
        of = {id(p): group["lr"] for group in groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            expected = next((share for piece, share in shares.items() if f".{piece}" in name), 1.0)
            assert of[id(parameter)] == expected, name


def test_without_a_rate_of_their_own_the_experts_take_the_common_one(mixture: Path) -> None:
    groups = parameter_groups(
        load_model(mixture, torch.float32), FinetuneConfig(learning_rate=5e-4, router_learning_rate=1e-2), (0, 1)
    )
    assert {group["lr"] for group in groups} == {5e-4, 1e-2}


# Low-rank updates


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM"]
)
def test_low_rank_updates_reach_every_expert_and_every_linear_layer_and_merge(
    architecture: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    upcycle(make_dense(architecture=architecture), tmp_path, UpcycleConfig(num_experts=4), 0, lambda *_: None)
    model, before = load_model(tmp_path, torch.float32), load_model(tmp_path, torch.float32)
    ids = torch.randint(before.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    merge = choose_trainable(model, FinetuneConfig(train="lora", lora_rank=2, lora_alpha=4), (0, 1))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    routers = {name for name, p in model.named_parameters() if p.requires_grad} - adapters.keys()
    assert len(routers) == 2
    assert all(re.search(r"(gate|router)\.weight$", name) for name in routers)
    # Two matrices for each of q, k, v, o, and for the two stacks of experts, which have a rank of 2 for each of 4
    # experts.
    assert len(adapters) == 2 * (4 + 2) * 2
    assert sum(8 in p.shape for name, p in adapters.items() if ".experts." in name) == 2 * 2 * 2
    assert torch.equal(model(ids).logits, before(ids).logits)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    adapted = model(ids).logits
    experts: list[Any] = [module.experts for module in model.modules() if hasattr(module, "experts")]
    watched = [stacked_weights(each) for each in experts]
    merge(True)
    for seen, module in zip(watched, (module for module in model.modules() if hasattr(module, "experts")), strict=True):
        torch.testing.assert_close(seen, module.experts.gate_up_proj)  # type: ignore[union-attr]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    changed = {
        name
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {name for name, _ in before.named_parameters() if re.search(r"[qkvo]_proj|experts", name)}
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if ".experts." in name:
            updates = new - old
            assert all(torch.linalg.matrix_rank(update, rtol=1e-3) == 2 for update in updates), name
            assert not torch.equal(updates[0], updates[1])


def test_a_shared_expert_of_no_width_has_no_updates(make_dense: MakeDense, tmp_path: Path) -> None:
    upcycle(make_dense(architecture="Qwen2ForCausalLM"), tmp_path, UpcycleConfig(num_experts=4), 0, lambda *_: None)
    model = load_model(tmp_path, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a tensor without elements that is to be drawn
        choose_trainable(model, FinetuneConfig(train="lora"), (0, 1))
    adapted = {name for name, p in model.named_parameters() if "lora_" in name}
    assert adapted
    assert not any(".shared_expert." in name for name in adapted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda given: given | {"r": 2 * given["r"]},
            r"12 .*down_proj: \(\(64, 48\).* learns, \(\(32, 48\).* was meant",
        ),
        (
            lambda given: (
                given | {"target_modules": [name for name in given["target_modules"] if "q_proj" not in name]}
            ),
            r"2 .*model\.layers\.0\.self_attn\.q_proj\.weight: nothing learns, \(\(8, 32\), \(32, 8\), 2\.0\) was "
            r"meant",
        ),
        (
            lambda given: given | {"target_parameters": given["target_parameters"] + ["0.mlp.gate.weight"]},
            r"1 .*layers\.0\.mlp\.gate\.weight: \(.* learns, whole was meant",
        ),
    ],
)
def test_what_peft_makes_otherwise_than_asked_is_refused(
    change: Any, told: str, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **given: made(**change(given)))
    with pytest.raises(UpcycleError, match=told):
        learning(mixture, train="lora")


def test_a_layer_whose_experts_are_called_otherwise_is_refused(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense2moe.upcycle.training.trainable._EXPERT_PARTS", (".specialists.",))
    with pytest.raises(
        UpcycleError, match=r"layers \[0, 1\] are to have experts, and no parameter in them is named as experts"
    ):
        learning(mixture, train="all")


# Dropout, and domains


def test_expert_dropout_scales_what_it_leaves_in_training_alone_and_comes_off(mixture: Path) -> None:
    model = load_model(mixture, torch.float32)
    ids = torch.arange(24)[None]
    plain = model(ids).logits
    remove = add_expert_dropout(model, 0.5)
    assert torch.equal(model(ids).logits, plain)
    model.train()
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert not torch.equal(first, second)
    activation: Any = model.model.layers[0].mlp.experts.act_fn  # type: ignore[union-attr, index]
    values = activation(torch.full((100_000,), 2.0)) / torch.nn.functional.silu(torch.tensor(2.0))
    assert set(values.round(decimals=4).tolist()) == {0.0, 2.0}
    assert float(values.mean()) == pytest.approx(1.0, abs=0.02)
    remove()
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize(
    ("num_domains", "num_experts", "top_k", "of_first", "of_second"),
    [
        (2, 4, 2, [[0, 1]] * 3, [[2, 3]] * 3),
        (2, 4, 1, [[0], [1], [0]], [[2], [3], [2]]),
        (2, 2, 2, [[0]] * 3, [[1]] * 3),
        (2, 8, 2, [[0, 1], [2, 3], [0, 1]], [[4, 5], [6, 7], [4, 5]]),
    ],
)
def test_domains_divide_the_experts_and_tokens_take_turns(
    num_domains: int, num_experts: int, top_k: int, of_first: list[list[int]], of_second: list[list[int]]
) -> None:
    found = domain_experts(torch.tensor([0, 1, 0]), 3, num_domains, num_experts, top_k)
    assert found.tolist() == [*of_first, *of_second, *of_first]
