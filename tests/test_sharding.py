"""What a launch under FSDP may ask for.

That the model is divided, and computes what it did, is shown in `test_many_processes`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.training.sharding import collect, collect_optimizer, fill_optimizer, is_divided


def launch(monkeypatch: pytest.MonkeyPatch, kind: DistributedType, **variables: str) -> None:
    monkeypatch.setattr(
        "dense2moe.upcycle.training.sharding.join_processes", lambda: SimpleNamespace(distributed_type=kind)
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_several_processes_divide_a_model_where_the_launcher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, DistributedType.MULTI_CPU)
    assert not is_divided()
    launch(monkeypatch, DistributedType.MULTI_CPU, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert is_divided()
    launch(monkeypatch, DistributedType.NO)
    assert not is_divided()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FSDP_VERSION": "1"},
            "finetune: FSDP of version 1 hides the names of what learns; give --fsdp_version 2, or set FSDP_VERSION=2",
        ),
        (
            {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "finetune: FSDP's activation checkpointing hides the names of what learns; set "
            "finetune.gradient_checkpointing instead",
        ),
        (
            {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "finetune: FSDP would keep parameters off the device that computes; give more processes, not "
            "--fsdp_offload_params",
        ),
    ],
)
def test_what_a_launch_may_not_ask_for_is_told(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, DistributedType.MULTI_CPU, ACCELERATE_USE_FSDP="true", **variables)
    with pytest.raises(UpcycleError) as excinfo:
        is_divided()
    assert str(excinfo.value) == message


def test_an_optimizer_goes_on_from_the_state_that_was_collected() -> None:
    def make(values: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(values.clone())
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = parameter.detach() - 1
        optimizer.step()

    parameter, optimizer = make(torch.arange(6.0))
    step(parameter, optimizer)
    state, (other, second) = copy.deepcopy(collect_optimizer(optimizer)), make(parameter.detach())
    fill_optimizer(second, state)
    step(parameter, optimizer)
    step(other, second)
    assert torch.equal(parameter, other)


def test_one_process_alone_collects_everything() -> None:
    assert {name: tensor.tolist() for name, tensor in collect({"a": torch.ones(2), "b": torch.zeros(1)}).items()} == {
        "a": [1.0, 1.0],
        "b": [0.0],
    }
