"""A mixture of experts that differ, against the dense modules themselves called in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ROWS
from shapes import each_shape
from test_hosts import CASES, PLAIN, SHAPES, ignore, load, save_dense
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.plan import plan_upcycle
from dense2moe.upcycle.building.receipt_cases import input_cases
from dense2moe.upcycle.building.receipt_text import NO_TEXT, read_text, reads_text
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.mixture import Mixture, find_base

Modules = list[nn.Module]


def list_ffns(model: PreTrainedModel, sites: list[dict[str, Any]]) -> Iterator[Modules]:
    """Each FFN, as the modules that are called one after the other."""
    for site in sites:
        base = find_base(model, site["ffn"])
        for layer in site["layers"]:
            yield [base.get_submodule(name.format(layer=layer)) for name in (site["ffn"], *site["passed"])]


def list_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Of its matrices alone: an activation that learns is no expert's own."""
    for each in module.modules():
        if isinstance(each, nn.Linear | Conv1D):
            yield from each.parameters()


def call(modules: Modules, states: torch.Tensor) -> torch.Tensor:
    """What an FFN gives."""
    for module in modules:
        states = module(states)
    return states


def replace_ffn(own: Modules, experts: list[Modules], router: torch.Tensor, top_k: int) -> None:
    """Let an FFN give what its experts give together: one token at a time, one expert at a time."""

    def combine(states: torch.Tensor) -> torch.Tensor:
        tokens, found = states.flatten(0, -2), []
        for token in tokens:
            scores = (router @ token).softmax(0)
            weights, chosen = scores.topk(top_k)
            given = [call(experts[expert], token[None])[0] for expert in chosen]
            found.append(sum(w * g for w, g in zip(weights / weights.sum(), given, strict=True)))
        return torch.stack(found).reshape(states.shape)

    own[0].forward = lambda states, *_, **__: combine(states)
    for module in own[1:]:
        module.forward = lambda states: states


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of WavLM's own
@pytest.mark.parametrize(("name", "architecture"), each_shape(CASES, set(SHAPES.values()), name="-".join))
def test_experts_that_differ_are_the_dense_modules(tmp_path: Path, name: str, architecture: str) -> None:
    """An activation, a bias or a gate's side that is wrong cannot hide behind experts that are copies.

    Each expert is another dense model's FFN, and the loop over them is written with transformers' own modules.
    """
    source = save_dense(tmp_path / "dense", name, architecture)
    plain = plan_upcycle(open_checkpoint(source), UpcycleConfig.model_validate(PLAIN))
    dense, sites = load_model(source, torch.float32, plain.conversion.family.task), plain.target_config.mixture["sites"]
    others = {f"source{number}": copy.deepcopy(dense) for number in range(PLAIN["num_experts"])}
    for model in others.values():
        for parameter in (p for ffn in list_ffns(model, sites) for module in ffn for p in list_weights(module)):
            parameter.data += torch.randn_like(parameter) * 0.2
    for source_name, model in others.items():
        model.save_pretrained(tmp_path / source_name)
    (tmp_path / "moe").mkdir()
    config = UpcycleConfig.model_validate({**PLAIN, "merging": {"method": "base"}})
    sources = {source_name: tmp_path / source_name for source_name in others}
    plan = upcycle(source, tmp_path / "moe", config, 0, ignore, sources=sources)
    mixture = load(tmp_path / "moe", plan)
    text = read_text(source, 32) if reads_text(dense.config) else NO_TEXT
    cases = list(input_cases(mixture, text.shorten(12), torch.float32))
    before = [case.run(dense) for case in cases]
    experts = zip(*(list_ffns(model, sites) for model in others.values()), strict=True)
    for own, layer, its_experts in zip(list_ffns(dense, sites), list_ffns(mixture, sites), experts, strict=True):
        assert isinstance(layer[0], Mixture)
        assert find_rates(own) == find_rates(layer)
        replace_ffn(own, list(its_experts), layer[0].router.weight, PLAIN["num_experts_per_tok"])
    for case, of_one in zip(cases, before, strict=True):
        found, expected = case.run(mixture), case.run(dense)
        scale = float(expected.abs().max())
        assert float((of_one - expected).abs().max()) > 1e-3 * scale, f"{case.name}: experts do not show"
        assert float((found - expected).abs().max()) <= 1e-5 * scale, case.name  # measured: 1e-6


def find_rates(modules: Modules) -> list[float]:
    """The rates of all dropouts within; those that are numbers of a layer are tested by themselves."""
    found = [each.p for module in modules for each in module.modules() if isinstance(each, nn.Dropout)]
    return sorted(rate for rate in found if rate)


RATES = {
    "bart": ("activation_dropout", "dropout"),
    "biogpt": ("activation_dropout",),
    "gpt2": ("resid_pdrop",),
    "modernbert": ("mlp_dropout",),
    "starcoder2": ("residual_dropout",),
    "wav2vec2": ("activation_dropout", "hidden_dropout"),
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in RATES.items() for field in fields])
def test_dropouts_stay_where_they_were(tmp_path: Path, name: str, field: str) -> None:
    """In training all but one is 0, and that one is 1: nothing is left to chance."""
    model = ROWS[name].make()
    rates = {key: 0.0 for key, value in model.config.to_dict().items() if "drop" in key and isinstance(value, float)}
    never = {key: 0.0 for key in ("mask_time_prob", "mask_feature_prob") if hasattr(model.config, key)}
    source = save_dense(tmp_path / "dense", name, **{**rates, **never, field: 1.0})
    (tmp_path / "moe").mkdir()
    plan = upcycle(source, tmp_path / "moe", UpcycleConfig.model_validate(PLAIN), 0, ignore)
    dense, mixture = load_model(source, torch.float32), load(tmp_path / "moe", plan)
    text = read_text(source, 32) if reads_text(dense.config) else NO_TEXT
    case = next(iter(input_cases(dense, text, torch.float32)))
    at_rest = case.run(dense)
    found, expected = case.run(mixture.train()), case.run(dense.train())
    assert not torch.allclose(expected, at_rest, rtol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
