"""The processes that share one run under `accelerate launch`."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

_PATIENCE = timedelta(days=30)  # the others wait while the first one does what only one can
_MOMENT = 0.2  # seconds

Found = TypeVar("Found")


def join_processes() -> PartialState:
    """This process among the others; the first call meets them."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def explain_single_process() -> str | None:
    """Why one process runs though `accelerate launch` asked for several.

    None where there is nothing to say. On CPUs it begins several by MPI alone, and otherwise one, without a word. It
    then sets where they would meet, which it does for several alone, and the number of none
    (`prepare_simple_launcher_cmd_env`, accelerate 1.15).
    """
    if join_processes().num_processes > 1 or not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        return None
    if "WORLD_SIZE" in os.environ:
        return None
    return (
        "accelerate launch was asked for several processes and began one, as it does on CPUs without MPI; to share the "
        "steps, launch with torchrun --standalone --nproc-per-node 2 -m dense2moe run RECIPE"
    )


def have_group() -> bool:
    """Whether a launcher started this process as part of a group.

    A group may have one process.
    """
    join_processes()
    return distributed.is_available() and distributed.is_initialized()


def leave_processes() -> None:
    """Part from the others when all have come to an end.

    One that is gone while another still listens takes that one down. gloo's threads let go of their last tensors a
    moment after the work is done, and abort the process where the interpreter is gone by then (issue 190489 of
    pytorch). They end with the group, which a trained model would keep until the interpreter's end; DTensor keeps it
    even so, and they are given the moment.
    """
    state = join_processes()
    if distributed.is_initialized():  # a launcher's only process has a group too
        gc.collect()
        state.wait_for_everyone()
        time.sleep(_MOMENT)
        state.destroy_process_group()


def tell(message: Found | None) -> Found:
    """The first process's value, in every process.

    The others pass none.
    """
    state, said = join_processes(), [message]
    return cast(Found, broadcast_object_list(said)[0] if state.num_processes > 1 else said[0])


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes in place; every process must call."""
    if join_processes().num_processes > 1:
        distributed.all_reduce(values)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over all processes in place; every process must call."""
    if join_processes().num_processes > 1:
        distributed.all_reduce(values)
        values /= join_processes().num_processes
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the CPU, gathered where FSDP divided it.

    Then every process must call it.
    """
    found = tensor.detach()
    if isinstance(found, DTensor):
        # torch cannot gather a width of 0
        found = found.full_tensor() if found.numel() else torch.empty(found.shape, dtype=found.dtype)
    return found.cpu().contiguous()


def divide(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Values laid out like a parameter.

    This process's part of them where FSDP has divided the parameter.

    Every process has all values.
    """
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(
        values.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def fill(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Set a parameter's values, each process its own part under FSDP."""
    with torch.no_grad():
        parameter.copy_(divide(values, parameter))


def on_main(function: Callable[[], Found]) -> Found:
    """The first process's result of a function, in every process."""
    return tell(function() if join_processes().is_main_process else None)
