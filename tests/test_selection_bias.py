"""Selection biases balance experts: moved by the load of a whole step, untouched by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_runs import (
    BLOCK,
    CONFIG,
    TrainAlone,
    make_biased,
    make_data,
    make_train_alone,
    read_biases,
)

from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules, selection_biases
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.training.order import draw_order
from dense2moe.upcycle.training.phase import Trained
from dense2moe.upcycle.training.trainable import parameter_groups

data, train_alone, biased = make_data, make_train_alone, make_biased  # fixtures


# Gates with a selection bias


def first_counts(mixture: Path, data: Path, num_blocks: int) -> torch.Tensor:
    """How many of the first blocks' tokens each expert of both layers gets, as the gates say themselves.

    Int64 [2, 4].
    """
    model, counts = load_model(mixture, torch.float32), []

    def count(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        counts.append(F.one_hot(output[2].flatten(), 4).sum(0))

    handles = [router.register_forward_hook(count) for router in router_modules(model)]
    train = read_blocks(data, "train")
    with torch.no_grad():
        model(train[list(draw_order(len(train), num_blocks, 0))])
    for handle in handles:
        handle.remove()
    return torch.stack(counts)


@pytest.mark.parametrize("train", ["all", "experts", "router", "lora"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_moves_each_bias_by_the_rate_against_the_load_of_all_its_parts(
    train: str, parts: int, train_alone: TrainAlone, biased: Path, data: Path
) -> None:
    still = {"learning_rate": 1e-20, "router_learning_rate": 1e-20, "warmup_steps": 0, "steps": 1}
    _, output = train_alone(
        CONFIG.model_copy(update=still | {"train": train, "gradient_accumulation_steps": parts}), mixture=biased
    )
    counts = first_counts(biased, data, 4)
    assert int(counts.sum()) == 2 * 4 * BLOCK * 2
    # the mean is 4 * BLOCK * 2 / 4
    expected = [[1e-3 * ((count < 2 * BLOCK) - (count > 2 * BLOCK)) for count in layer] for layer in counts.tolist()]
    assert any(value for layer in expected for value in layer)
    assert read_biases(output).flatten().tolist() == pytest.approx([value for layer in expected for value in layer])
    assert read_biases(output).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        ({}, (True, True)),
        ({"bias_update_rate": 0.0}, (False, False)),
        ({"train": "last-1"}, (False, True)),
        ({"train": "experts", "routing": "by-domain"}, (False, False)),
        ({"train": "prompt"}, (False, False)),
    ],
)
def test_a_bias_moves_where_its_router_learns(
    settings: dict[str, Any], moving: tuple[bool, bool], train_alone: TrainAlone, biased: Path
) -> None:
    _, output = train_alone(CONFIG.model_copy(update={"steps": 2, **settings}), mixture=biased)
    assert [bool(layer.any()) for layer in read_biases(output)] == list(moving)


def test_no_gradient_and_no_optimizer_reaches_a_bias(biased: Path) -> None:
    model = load_model(biased, torch.float32)
    groups = parameter_groups(model, CONFIG, (0, 1))
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for bias in selection_biases(model):
        assert bias is not None
        assert not bias.requires_grad
        assert id(bias) not in held


def imbalance(trained: Trained) -> float:
    """The mean over the last steps and layers of half the sum of the loads' distances from a quarter."""
    last = [layer.load for step in trained.history[-8:] for layer in step.layers]
    return sum(abs(share - 0.25) for load in last for share in load) / 2 / len(last)


def test_an_unbalanced_router_becomes_balanced_by_its_bias_alone(train_alone: TrainAlone, biased: Path) -> None:
    alone = {"balance_coefficient": 0.0, "domain_coefficient": 0.0}
    config = CONFIG.model_copy(update={"steps": 60, "eval_steps": 60} | alone)
    without, with_bias = (
        train_alone(config.model_copy(update={"bias_update_rate": rate}), mixture=biased)[0] for rate in (0.0, 2e-2)
    )
    assert imbalance(without) > 0.1
    assert imbalance(with_bias) < 0.6 * imbalance(without)  # 0.52; the load is that of the last steps together


def test_the_best_weights_come_back_with_their_biases(train_alone: TrainAlone, biased: Path) -> None:
    """With rates that harm the model from the first step on, the best look is the first.

    Whose biases moved by one step.
    """
    config = CONFIG.model_copy(
        update={
            "steps": 4,
            "domain_coefficient": 0.0,  # which has something to learn at first
            "eval_steps": 1,
            "patience": 2,
            "learning_rate": 3e-1,
            "schedule": "constant",
            "warmup_steps": 0,
        }
    )
    trained, output = train_alone(config, mixture=biased)
    assert trained.last_step > trained.best_step == 1
    assert float(read_biases(output).abs().max()) == pytest.approx(1e-3)
