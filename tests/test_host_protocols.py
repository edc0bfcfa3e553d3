"""Mixtures of our own under transformers' protocols: training, devices and adapters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from test_hosts import PLAIN, ignore, save_dense
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, Trainer, TrainingArguments

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.mixture_classes import find_class
from dense2moe.upcycle.models.mixture import Mixture

IDS = torch.arange(24).reshape(2, 12) % 90 + 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of a tiny BERT, whose experts differ. Shared: read only."""
    return make_mixture(tmp_path_factory.mktemp("bert"), "bert")


def make_mixture(directory: Path, name: str) -> Path:
    """A mixture whose experts differ, and whose router chooses."""
    source, output = save_dense(directory / "dense", name), directory / "moe"
    output.mkdir()
    settings = {**PLAIN, "experts": {"noise": 0.5}, "router": {"logit_std": 1.0}}
    upcycle(source, output, UpcycleConfig.model_validate(settings), 0, ignore)
    return output


def load(directory: Path, **settings: Any) -> PreTrainedModel:
    """A masked model by its auto class, in evaluation mode."""
    loaded: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(directory, **settings).eval()
    return loaded


def logits(model: nn.Module) -> torch.Tensor:
    """Of two rows of tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the loss of two rows of tokens, by the parameters' names."""
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def is_mixed(name: str) -> bool:
    """Whether a parameter is a router's or of experts."""
    return ".router." in name or ".experts." in name


BY_LAYER = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk", "cls": "cpu"}


@pytest.mark.parametrize("where", ["cpu", "auto", BY_LAYER], ids=["cpu", "auto", "a layer on disk"])
def test_a_device_map_places_it(bert: Path, tmp_path: Path, where: str | dict[str, str]) -> None:
    assert torch.equal(logits(load(bert, device_map=where, offload_folder=tmp_path)), logits(load(bert)))


def test_it_is_sharded_copied_and_pickled(bert: Path, tmp_path: Path) -> None:
    model = load(bert)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for same in (load(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same), logits(model))


def test_experts_implementations_agree_in_gradients(bert: Path) -> None:
    eager, grouped = (
        gradients(load(bert, experts_implementation=implementation)) for implementation in ("eager", "grouped_mm")
    )
    assert sum(map(is_mixed, eager)) == 2 * 5
    assert eager.keys() == grouped.keys()
    for name, gradient in eager.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(grouped[name], gradient, rtol=0, atol=1e-5 * scale + 1e-9)


def test_gradient_checkpointing_gives_the_same_gradients(bert: Path) -> None:
    plain, model = gradients(load(bert)), load(bert).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable()
    found = gradients(model)
    assert plain.keys() == found.keys()
    assert all(torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-8) for name, gradient in plain.items())


def test_the_trainer_trains_router_and_experts(bert: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in load(bert).state_dict().items()}
    model = load(bert)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=rows).train()
    after = model.eval().state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items() if is_mixed(name))
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(load(tmp_path / "trained")), logits(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # which peft asks for
def test_peft_adapts_attention_and_experts(bert: Path, tmp_path: Path) -> None:
    """Each expert's matrices get a factor of their own; saved and loaded, the adapter gives the same."""
    wanted = LoraConfig(
        r=2, target_modules=["query", "value"], target_parameters=["experts.up_proj", "experts.down_proj"]
    )
    model = get_peft_model(load(bert), wanted)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {kind: sum(kind in name for name in learning) for kind in ("query", "value", "experts")} == {
        "query": 4,
        "value": 4,
        "experts": 8,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):  # in the first step only the factors that start at zero have gradients
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert not torch.allclose(logits(model), logits(load(bert)), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(bert), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(("name", "architecture"), [("bert", "BertForMaskedLM"), ("clip", "CLIPModel")])
def test_a_new_model_has_weights(name: str, architecture: str) -> None:
    """A base within another model, which knows no experts, does not leave them as memory was."""
    config = ROWS[name].make(architecture).config
    width = getattr(config, "text_config", config)
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    ffn = {"bert": "encoder.layer.{layer}.intermediate", "clip": "text_model.encoder.layers.{layer}.mlp"}[name]
    site = {
        "ffn": ffn,
        "passed": [],
        "layers": [0],
        "hidden_size": width.hidden_size,
        "intermediate_size": 16,
        "activation": "gelu",
        "gated": True,
        "up_bias": True,
        "down_bias": True,
        "inner_dropout": 0.0,
        "dropout": 0.0,
        "shared_size": 8,
    }
    section = {"num_experts": 4, "num_experts_per_tok": 2, "sites": [site]}
    own = find_class(f"Mixture{architecture}")
    layer = next(m for m in own(own.config_class(mixture=section, **fields)).modules() if isinstance(m, Mixture))
    spreads = {key: float(value.detach().std()) for key, value in layer.named_parameters()}
    assert all((spread == 0.0) if "bias" in key else 0.001 < spread < 1.0 for key, spread in spreads.items()), spreads
