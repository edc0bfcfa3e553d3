"""Routers overruled: each expert alone, the best by domain, and chance, beside loops of hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make_data

from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN, next_token_loss
from dense2moe.upcycle.training.oracle import measure_oracle

__all__ = ["make_data"]  # a fixture


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def mixture(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that differ by noise as large as their weights."""
    output = tmp_path_factory.mktemp("noisy")
    config = UpcycleConfig(num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=1.0))
    upcycle(dense_checkpoint, output, config, 0, quiet)
    return output


def mean_losses(directory: Path, data: Path, expert: int | None) -> list[float]:
    """The mean loss of the first 16 or fewer blocks of each domain; to `expert` alone if given."""
    model, test = load_model(directory, torch.float32), read_examples(data, "test")

    def force(_: Any, __: Any, output: Any) -> Any:
        return (output[0], torch.full_like(output[1], 0.5), torch.full_like(output[2], expert))

    for router in router_modules(model) if expert is not None else ():
        router.register_forward_hook(force)
    found = []
    for number in (0, 1):
        blocks = test.ids[test.domains == number]
        places = torch.linspace(0, len(blocks) - 1, min(16, len(blocks))).round().long()
        with torch.no_grad():
            losses = [next_token_loss(model(block[None]).logits, block[None]) for block in blocks[places]]
        found.append(float(torch.stack(losses).mean()))
    return found


def test_each_row_is_the_loss_with_the_routers_overruled(mixture: Path, data: Path) -> None:
    found = measure_oracle(mixture, data, NEXT_TOKEN)
    assert found is not None
    assert list(found.routed.values()) == pytest.approx(mean_losses(mixture, data, None), rel=1e-5)
    alone = [mean_losses(mixture, data, expert) for expert in range(4)]
    for row, expected in zip(found.experts, alone, strict=True):
        assert list(row.values()) == pytest.approx(expected, rel=1e-5)
    for number, name in enumerate(("letters", "digits")):
        losses = [row[number] for row in alone]
        assert found.best_expert[name] == losses.index(min(losses))
        assert found.oracle[name] == pytest.approx(min(losses), rel=1e-5)
    assert found.random.keys() == found.routed.keys()
    assert all(found.random[name] != found.routed[name] for name in found.random)


def test_copies_cost_the_same_wherever_tokens_go(dense_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    upcycle(dense_checkpoint, tmp_path, UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, quiet)
    found = measure_oracle(tmp_path, data, NEXT_TOKEN)
    assert found is not None
    for row in (*found.experts, found.random, found.oracle):
        assert list(row.values()) == pytest.approx(list(found.routed.values()), rel=1e-5)


def test_a_dense_model_has_no_routers_to_overrule(dense_checkpoint: Path, data: Path) -> None:
    assert measure_oracle(dense_checkpoint, data, NEXT_TOKEN) is None
