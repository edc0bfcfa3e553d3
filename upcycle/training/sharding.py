"""A model divided among the processes, by FSDP of version 2.

accelerate divides parameters, gradients and the optimizer's state, one decoder layer at a time. What it leaves open is
settled here:

1. accelerate divides models among GPUs alone; processes on CPUs do as those on GPUs, over gloo.
2. Unless it is told the layers it takes the model as one piece, which each pass would gather whole. Every decoder layer
   is a piece.
3. In bfloat16 it would sum gradients in bfloat16 as well; they are summed in float32.
4. What is stored is whole tensors, written by the first process, so that any number of processes can read them, with
   FSDP or without.

The input and output embeddings and the last norm stay gathered from a forward pass to the next backward pass. What
reads or writes parameters in between must call `reshard` first: what it wrote into the gathered copy would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.training.processes import divide, join_processes, whole

Key = TypeVar("Key")


def is_divided() -> bool:
    """Whether the launcher asked for FSDP with several processes.

    Raises:
        UpcycleError: it asked for what hides the names of what learns, or for parameters elsewhere than where they
            compute.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or join_processes().distributed_type == DistributedType.NO:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UpcycleError(
            "finetune: FSDP of version 1 hides the names of what learns; give --fsdp_version 2, or set FSDP_VERSION=2"
        )
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UpcycleError(
            "finetune: FSDP's activation checkpointing hides the names of what learns; set "
            "finetune.gradient_checkpointing instead"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UpcycleError(
            "finetune: FSDP would keep parameters off the device that computes; give more processes, not "
            "--fsdp_offload_params"
        )
    return True


def divide_by(accelerator: Accelerator) -> None:
    """Make an accelerator divide models by decoder layer, on CPUs too."""
    state: Any = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = state.fsdp_plugin
    # the model's own `_no_split_modules`
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = (
        transformer_auto_wrap_policy,
        None,
    )
    plugin.cpu_ram_efficient_loading = False  # every process has read the checkpoint
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters; only this process's parts stay."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Context manager: every process can read a whole decoder layer."""
    if isinstance(layer, FSDPModule):
        layer.unshard()
    try:
        yield
    finally:
        if isinstance(layer, FSDPModule):
            layer.reshard()


def collect(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Whole tensors on the first process's CPU; the others send parts."""
    found = {}
    for name, tensor in tensors.items():
        values = whole(tensor)
        if join_processes().is_main_process:
            found[name] = values
    return found


def collect_model(model: nn.Module) -> None:
    """Put the whole model on the first process's CPU.

    The other processes hold its shapes only.

    It is no longer to be run.
    """
    reshard(model)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:  # a tied one is met twice
                values = whole(parameter)
                kept = values if join_processes().is_main_process else values.to("meta")
                made[parameter] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]


def collect_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as on one process.

    Empty in all processes but the first.
    """
    state = optimizer.state_dict()
    whole_state = {number: collect(values) for number, values in state["state"].items()}
    return state | {"state": whole_state} if join_processes().is_main_process else {}


def fill_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer with the state that `collect_optimizer` returned.

    Each process takes its part.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        state["state"][number] = {
            name: divide(value, parameter) if value.shape == parameter.shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(state)
