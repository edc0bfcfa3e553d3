"""Layers and numbers that the settings ask for, resolved or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plans import (
    T5,
    TOP_1,
    plan,
    refusal,
)
from pydantic import ValidationError

from dense2moe.upcycle.building.choice import resolve_layers
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("all", 1, (0,)),
        ("last-half", 4, (2, 3)),
        ("last-half", 5, (2, 3, 4)),
        ("last-half", 1, (0,)),
        ("every-1", 3, (0, 1, 2)),
        ("every-2", 5, (1, 3)),
        ("every-3", 3, (2,)),
        ((4, 0, 2), 5, (0, 2, 4)),
    ],
)
def test_layers_are_resolved_to_numbers_in_order(
    layers: str | tuple[int, ...], num_layers: int, expected: tuple[int, ...]
) -> None:
    assert resolve_layers(layers, num_layers) == expected


@pytest.mark.parametrize(
    ("layers", "named"),
    [((0, 2), "layer 2"), ((1, 99, 0), "layer 99"), ("every-3", "every-3")],
)
def test_layers_beyond_the_last_are_refused(
    layers: str | tuple[int, ...], named: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    assert refusal(dense_checkpoint, tmp_path, layers=layers) == (
        f"upcycle.layers: {named} is not in a model of 2 layers; must be of 0 to 1"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts": 5, "experts": ExpertsConfig(kind="split")},
            "a multiple of 5 to be cut into split experts; choose another upcycle.num_experts or granularity",
        ),
        (
            {"num_experts": 10, "num_experts_per_tok": 5, "experts": ExpertsConfig(kind="granular", granularity=5)},
            "a multiple of 5 to be cut into granular experts; choose another upcycle.num_experts or granularity",
        ),
    ],
)
def test_a_width_that_does_not_divide_is_refused(
    settings: dict[str, Any], message: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    assert (
        refusal(dense_checkpoint, tmp_path, **settings)
        == f"{dense_checkpoint}: the FFN's width is 48; it must be {message}"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3; it must be at most num_experts, which is 2",
        ),
        (
            {"num_experts": 5, "experts": ExpertsConfig(kind="granular", granularity=2)},
            "num_experts is 5; it must be a multiple of experts.granularity, which is 2",
        ),
        (
            {"num_experts": 6, "num_experts_per_tok": 3, "experts": ExpertsConfig(kind="granular", granularity=2)},
            "num_experts_per_tok is 3; it must be a multiple of experts.granularity, which is 2",
        ),
        (
            {
                "num_experts": 4,
                "experts": ExpertsConfig(kind="granular", granularity=2),
                "router": RouterConfig(logit_std=0.0),
            },
            "router.logit_std is 0; it must be greater with granular experts, or a tie of all chooses parts of "
            "different copies",
        ),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_before_any_model_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as excinfo:
        UpcycleConfig(**settings)
    assert [error["msg"] for error in excinfo.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize(
    ("layers", "stack", "chosen"),
    [
        ("last-half", "encoder", [2, 3]),
        ((0,), "encoder", [0]),
        ((0, 1, 3), "encoder", [0, 1, 3]),
        ((1, 3), "decoder", [1, 3]),
    ],
)
def test_layers_that_switch_transformers_cannot_count_are_refused(
    layers: Any, stack: str, chosen: list[int], make_dense: MakeDense, tmp_path: Path
) -> None:
    directory = make_dense(architecture=T5, num_decoder_layers=6)
    assert refusal(directory, tmp_path, layers=layers, **TOP_1) == (
        f"upcycle.layers: SwitchTransformersForConditionalGeneration cannot have experts in the {stack}'s layers "
        f"{chosen} alone; use all or every-2"
    )


@pytest.mark.parametrize("layers", ["all", "every-1", "every-2"])
@pytest.mark.parametrize(("encoder", "decoder"), [(2, 3), (4, 5), (6, 7)])
def test_all_layers_and_every_second_are_what_switch_transformers_builds(
    layers: str, encoder: int, decoder: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    found = plan(make_dense(architecture=T5, num_layers=encoder, num_decoder_layers=decoder), layers=layers, **TOP_1)
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(found.target_config)
    for number, stack in enumerate((model.encoder, model.decoder)):
        assert [site.layer for site in found.sites if site.stack == number] == [
            n for n, block in enumerate(stack.block) if block.is_sparse
        ]
