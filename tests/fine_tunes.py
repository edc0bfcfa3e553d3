"""Tiny fine-tuned checkpoints of one base, for tests of merging."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def fine_tune(
    base: Path,
    target: Path,
    seed: int,
    amount: float = 0.1,
    of: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype | None = None,
) -> Path:
    """A copy of a checkpoint in which the tensors that `of` names are changed by normal noise.

    The noise has `amount` times the tensor's own deviation and mean size, so that norms change as well.
    """
    shutil.copytree(base, target)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    for name, tensor in state.items():
        exact = tensor.float()
        if of(name):
            exact = exact + torch.empty(exact.shape).normal_(generator=generator) * amount * exact.abs().mean()
        state[name] = exact.to(dtype or tensor.dtype)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def is_ffn(name: str) -> bool:
    """Whether a tensor of a decoder is one of its FFNs'."""
    return ".mlp." in name
