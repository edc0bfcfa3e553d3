"""A reference's experts on the disk, read layer by layer.

A layer's experts are read when the layer computes. Most weights of a mixture are its experts', and of these a forward
needs one layer's at a time. So one run of memory for each shape holds whichever layer computes, filled with the rows of
the checkpoint that the layer was loaded from. The modules are transformers' own, and their weights are to the bit those
that it loads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dense2moe.export.footprint import LEFT_ON_DISK_BYTES
from dense2moe.export.quantization.parameters import RowRange, locate_parameters
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import read_chunks
from dense2moe.upcycle.memory import release_memory


@dataclass
class _Memory:
    """Memory for experts of one shape, and whose experts are there.

    They are there while they compute.
    """

    values: torch.Tensor
    owner: nn.Parameter | None = None


@dataclass(frozen=True)
class _Stored:
    """A parameter [experts, rows, width], and its rows in the checkpoint.

    The rows are in order.
    """

    parameter: nn.Parameter
    checkpoint: Checkpoint
    pieces: Sequence[RowRange]
    memory: _Memory

    def fetch(self) -> None:
        """Read its values, if the memory holds another layer's."""
        if self.memory.owner is self.parameter:
            return
        self.memory.owner = None  # should reading fail
        rows, row = self.memory.values.view(-1, self.memory.values.shape[-1]), 0
        for piece in self.pieces:
            entry = self.checkpoint.entries[piece.name]
            flat = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
            for chunk in read_chunks(flat, piece.start, piece.stop):
                rows[row : row + len(chunk)].copy_(chunk)
                row += len(chunk)
        assert row == len(rows), "rows of the checkpoint that are no whole parameter"
        self.memory.owner = self.parameter


def leave_experts_on_disk(model: PreTrainedModel, directory: Path) -> None:
    """Free a loaded model's experts; layers read them when they compute.

    The model was loaded from `directory`. Nothing is done where they take little memory, or where one tensor of the
    checkpoint is a parameter as it is: products are told by the addresses of such tensors, which layers would share.
    """
    blocks = [module for module in model.modules() if hasattr(module, "is_transposed")]  # as transformers marks experts
    stacked = [[each for each in block.parameters() if each.ndim == 3] for block in blocks]
    if sum(each.numel() * each.element_size() for some in stacked for each in some) < LEFT_ON_DISK_BYTES:
        return
    checkpoint = open_checkpoint(directory)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    if any(named[id(each)] in checkpoint.entries for some in stacked for each in some):
        return
    located = locate_parameters(model, {name: entry.shape for name, entry in checkpoint.entries.items()})
    memories: dict[tuple[int, torch.Size], _Memory] = {}
    for block, parameters in zip(blocks, stacked, strict=True):
        own = []
        for number, parameter in enumerate(parameters):
            shared = memories.setdefault((number, parameter.shape), _Memory(torch.empty_like(parameter.data)))
            parameter.data = shared.values
            own.append(_Stored(parameter, checkpoint, located[named[id(parameter)]], shared))
        block.register_forward_pre_hook(_fetch_all(own))
    release_memory()


def _fetch_all(stored: Sequence[_Stored]) -> Any:
    def hook(*_: Any) -> None:
        for each in stored:
            each.fetch()

    return hook
