"""Mixtures of ours in training: their experts' forward, what learns, and masked tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_hosts import PLAIN, convert, save_dense
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.models import mixture
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.masked_token import Masking, masked_token
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.expert_forward import sorted_experts_forward
from dense2moe.upcycle.training.router_gradient import measure_router_gradient
from dense2moe.upcycle.training.trainable import plan_learning


class Config:
    """What the experts ask of a model's config."""

    _experts_implementation = "eager"


def make_experts(is_gated: bool, has_bias: bool) -> torch.nn.Module:
    site = {
        "hidden_size": 6,
        "intermediate_size": 5,
        "gated": is_gated,
        "up_bias": has_bias,
        "down_bias": has_bias,
    }
    experts_class = mixture._EXPERTS[is_gated, has_bias]
    experts: torch.nn.Module = experts_class(Config(), site, 3, torch.nn.GELU())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts.double()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_sorted_experts_are_transformers_own(is_gated: bool, has_bias: bool) -> None:
    """Values and all gradients, of every kind of experts."""
    experts = make_experts(is_gated, has_bias)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weights, chosen = torch.randn(9, 3, dtype=torch.float64).softmax(-1).topk(2)
    own = experts(hidden, chosen, weights)
    found = sorted_experts_forward(experts, hidden, chosen, weights)
    torch.testing.assert_close(found, own)
    wanted = (hidden, *experts.parameters())
    for left, right in zip(
        torch.autograd.grad(found.square().sum(), wanted), torch.autograd.grad(own.square().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    convert(save_dense(folder / "dense", "bert"), folder / "moe", PLAIN)
    return folder


@pytest.fixture(scope="module")
def model(made: Path) -> PreTrainedModel:
    return load_model(made / "moe", torch.float32, "fill-mask")


def learning(model: PreTrainedModel, train: str) -> frozenset[str]:
    settings = FinetuneConfig.model_validate({"train": train})
    return plan_learning(model, settings, sparse_layers(model)).whole


def test_what_learns_is_found_by_layers(model: PreTrainedModel) -> None:
    """As for native targets, under a host's own names."""
    assert len(find_layers(model)) == len(sparse_layers(model)) == 2
    router = learning(model, "router")
    assert router == {f"bert.encoder.layer.{n}.intermediate.router.weight" for n in range(2)}
    experts = learning(model, "experts") - router
    assert experts == {name for name, _ in model.named_parameters() if ".experts." in name}
    assert len(experts) == 2 * 4
    last = learning(model, "last-1")
    assert {name for name in last if ".layer." in name} == {
        name for name, _ in model.named_parameters() if ".layer.1." in name
    }
    assert not any("embeddings" in name for name in last)


def test_a_dense_control_learns_what_corresponds(made: Path) -> None:
    dense = load_model(made / "dense", torch.float32, "fill-mask")
    found = plan_learning(dense, FinetuneConfig.model_validate({"train": "experts"}), (0, 1)).whole
    assert found == {
        f"bert.encoder.layer.{n}.{module}.dense.{kind}"
        for n in range(2)
        for module in ("intermediate", "output")
        for kind in ("weight", "bias")
    }


def test_masked_tokens_reach_routers_once_experts_differ(made: Path, tmp_path: Path) -> None:
    task = masked_token(Masking(4, (0, 1, 2, 3, 4), 96))
    blocks = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    assert measure_router_gradient(made / "moe", Examples.of_blocks(blocks), task) < 1e-6
    convert(made / "dense", tmp_path / "apart", {**PLAIN, "experts": {"noise": 0.5}})
    assert measure_router_gradient(tmp_path / "apart", Examples.of_blocks(blocks), task) > 1e-4
