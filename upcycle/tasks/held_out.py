"""The loss of a task, block by block of held-out text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.tasks.task import Task

Predict = Callable[[dict[str, Any]], torch.Tensor]
"""Predictions [B, ...] of a model that is called with `Task.inputs`."""


@torch.no_grad()  # not inference_mode: what FSDP gathers in its first pass it keeps for training
def block_losses(predict: Predict, blocks: torch.Tensor, device: torch.device, task: Task) -> list[float]:
    """The mean loss of each block of token ids [blocks, block_size].

    Every block stands alone.
    """
    losses: list[float] = []
    for ids in blocks.split(EVALUATION_BATCH):
        batch = {"input_ids": ids.to(device)}
        predictions = predict(task.inputs(batch))
        for row, block in zip(predictions, batch["input_ids"], strict=True):
            losses.append(float(task.loss(row[None], {"input_ids": block[None]})))
    return losses
