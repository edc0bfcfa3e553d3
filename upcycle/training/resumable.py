"""Resumable state of a phase: weights that change, optimizer, schedule.

A checkpoint holds what learns, and the selection biases that move, by their names in memory. The Trainer's own loses
experts and routers when it is loaded: it looks for the names in memory, where experts are stacked, and its file has one
tensor an expert. What is stored is whole tensors, written by the first process, so that any number of processes can
read them, with FSDP or without. A checkpoint is whole once it is sealed (`dense2moe.upcycle.durable`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dense2moe.upcycle.checkpoints.writer import TensorSpec, write_tensors
from dense2moe.upcycle.durable import is_kept
from dense2moe.upcycle.training.processes import fill, join_processes
from dense2moe.upcycle.training.sharding import collect, collect_optimizer, fill_optimizer, reshard

START_NAME = "start"  # beside the checkpoints: what learns, before the first step
_WEIGHTS_STEM = "learning"


def checkpoint_folder(scratch: Path, step: int) -> Path:
    """The folder of a step's checkpoint; step 0 is the start."""
    return scratch / (f"checkpoint-{step}" if step else START_NAME)


def find_checkpoints(scratch: Path) -> list[Path]:
    """The folders of all checkpoints, whole or not, but for the start."""
    return list(scratch.glob("checkpoint-*"))


def last_checkpoint(scratch: Path, before: Path | None = None) -> Path | None:
    """The newest whole checkpoint, or the newest before a given one."""
    folders = {count_steps(folder): folder for folder in find_checkpoints(scratch) if is_kept(folder)}
    steps = [step for step in folders if before is None or step < count_steps(before)]
    return folders[max(steps)] if steps else None


def count_steps(checkpoint: Path) -> int:
    """How many steps of the phase were done at a checkpoint."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def describe_last(scratch: Path) -> str:
    """Where the last whole checkpoint is, to end a message.

    Empty without a checkpoint.
    """
    last = last_checkpoint(scratch)
    return f"; the last good checkpoint is {last}" if last else ""


def save_weights(model: nn.Module, moving: Mapping[int, torch.Tensor], directory: Path) -> None:
    """Write trainable weights and moving selection biases.

    Every process must call it.
    """
    reshard(model)
    changing = collect(_changing(model, moving))
    if join_processes().is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in changing.items()]
        # One tensor after the other: safetensors' own writer makes a copy of them all.
        write_tensors(directory, specs, changing.items(), sys.maxsize, stem=_WEIGHTS_STEM)


def load_weights(model: nn.Module, moving: Mapping[int, torch.Tensor], directory: Path) -> None:
    """Read back what `save_weights` wrote."""
    reshard(model)
    changing = _changing(model, moving)
    with safe_open(directory / f"{_WEIGHTS_STEM}.safetensors", framework="pt", backend="pread") as stored:
        assert set(stored.keys()) == changing.keys()
        for name, tensor in changing.items():
            fill(tensor, stored.get_tensor(name))


def _changing(model: nn.Module, moving: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters that learn and biases that move, by name in memory."""
    biases = {id(bias) for bias in moving.values()}
    found: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return found | {name: buffer for name, buffer in model.named_buffers() if id(buffer) in biases}


def save_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, directory: Path) -> None:
    """Write an optimizer and its schedule; every process must call.

    In one form, however many processes there are, and whether FSDP divides the state or not.
    """
    state = collect_optimizer(optimizer)
    if join_processes().is_main_process:
        for name, content in ((OPTIMIZER_NAME, state), (SCHEDULER_NAME, scheduler.state_dict())):
            # torch loses the reason of a failure where it opens the file itself
            with (directory / name).open("wb") as file:
                torch.save(content, file)


def load_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, directory: Path, is_divided: bool) -> None:
    """Read back what `save_optimizer` wrote.

    A model that FSDP divides reads it without holding it whole.
    """
    state = torch.load(directory / OPTIMIZER_NAME, map_location="cpu", mmap=is_divided, weights_only=True)
    fill_optimizer(optimizer, state)
    scheduler.load_state_dict(torch.load(directory / SCHEDULER_NAME, weights_only=True))
