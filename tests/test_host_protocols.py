"""Mixtures of our own under transformers' protocols: training, devices, adapters, other versions."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from test_hosts import PLAIN, edit_config, ignore, save_dense
from test_transformers4 import PYTHON, RECIPE
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, Trainer, TrainingArguments

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


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_a_device_map_places_it(bert: Path, where: str) -> None:
    assert torch.equal(logits(load(bert, device_map=where)), logits(load(bert)))


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


# In other versions


def test_modules_of_other_names_are_named(bert: Path, tmp_path: Path) -> None:
    """A version of transformers that renames modules, or that is too old."""
    config = json.loads((bert / "config.json").read_text())
    site = config["mixture"]["sites"][0] | {"ffn": "encoder.layer.{layer}.feed_forward"}
    directory = tmp_path / "moe"
    directory.mkdir()
    for file in bert.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    edit_config(directory, mixture=config["mixture"] | {"sites": [site]})
    with pytest.raises(AttributeError, match=r"BertModel of transformers 5\S* has no module \S*0.feed_forward"):
        load(directory)
    edit_config(directory, mixture=config["mixture"] | {"oldest_transformers": "99.1.0"})
    with pytest.raises(ImportError, match=r"mixture_bert needs transformers 99\.1\.0 or newer; this is 5"):
        load(directory)


OLD = """
import json, sys
import torch, transformers
for auto, directory in json.loads(sys.argv[1]):
    try:
        model, info = getattr(transformers, auto).from_pretrained(
            directory, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            found = model.eval()(torch.arange(24).reshape(2, 12) % 90 + 3).logits.tolist()
    except ImportError as error:
        found = str(error)
    print(json.dumps(found))
"""


@pytest.mark.transformers4
def test_transformers_4_runs_the_source_beside_the_checkpoint(bert: Path, tmp_path: Path) -> None:
    """The same logits; or, where modules have other names there, which version has these."""
    gpt2, vit = (make_mixture(tmp_path / name, name) for name in ("gpt2", "vit"))
    asked = [
        ("AutoModelForMaskedLM", bert),
        ("AutoModelForCausalLM", gpt2),
        ("AutoModelForImageClassification", vit),
    ]
    masked, causal, refused = run_transformers_4(asked, tmp_path)
    expected = (logits(load(bert)), logits(AutoModelForCausalLM.from_pretrained(gpt2).eval()))
    for found, own in zip((masked, causal), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), own, rtol=1e-5, atol=1e-5)
    assert refused.startswith("mixture_vit needs transformers 5.23.0 or newer; this is 4.57")


def run_transformers_4(asked: list[tuple[str, Path]], folder: Path) -> Iterator[Any]:
    """What the environment of transformers 4 gives for each auto class and directory."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"needs transformers 4 ({RECIPE}) and {PYTHON}")
    (folder / "old.py").write_text(OLD)
    done = subprocess.run(
        [python, str(folder / "old.py"), json.dumps([(auto, str(path)) for auto, path in asked])],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (json.loads(line) for line in done.stdout.splitlines())
