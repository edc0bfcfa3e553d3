"""A task: what a model is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.model_class import find_model_class

Batch = Mapping[str, torch.Tensor]
"""Tensors of several examples by name, the first dimension of each their number."""


@dataclass(frozen=True)
class Task:
    """What a model predicts, its training loss and its figures.

    name: the task's name at Hugging Face, which says which auto class loads its models.
    inputs: what a model is called with, from a batch.
    loss: the mean loss of predictions [B, ...] for a batch, a scalar.
    divergence: how far predictions are from a teacher's at a temperature, a scalar to be mixed with the loss.
    figures: what a model is judged by, the most important first, from the mean loss of its examples.
    unread: more arguments for a pass whose predictions nobody reads.
    decodes: whether a model says one token after the other; else its speed is that of a pass.
    """

    name: str
    inputs: Callable[[Batch], dict[str, Any]]
    loss: Callable[[torch.Tensor, Batch], torch.Tensor]
    divergence: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    figures: Callable[[float], tuple[Figure, ...]]
    unread: Mapping[str, Any]
    decodes: bool = True

    @property
    def model_class(self) -> Any:
        """The auto class of transformers that loads models for this task."""
        return find_model_class(self.name)
