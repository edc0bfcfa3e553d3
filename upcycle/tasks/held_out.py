"""Held-out examples: the loss of each, and what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.task import Task

Predict = Callable[[dict[str, Any]], torch.Tensor]
"""Predictions [B, ...] of a model that is called with `Task.inputs`."""


@dataclass(frozen=True)
class HeldOut:
    """Mean loss of each example, and its answer if any."""

    losses: tuple[float, ...]
    answers: tuple[LabelAnswer, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss over examples."""
        return fmean(self.losses)

    def figures(self, task: Task) -> tuple[Figure, ...]:
        """The task's figures, the most important first."""
        return task.figures(self.losses, self.answers)


@torch.no_grad()  # not inference_mode: what FSDP gathers in its first pass it keeps for training
def judge_examples(predict: Predict, examples: Examples, device: torch.device, task: Task) -> HeldOut:
    """Loss and answer of each example; every example stands alone.

    They are read in batches of about the same length, and told in the order that they have.
    """
    losses: list[float] = []
    answers: list[LabelAnswer] = []
    parts = examples.parts_by_length(EVALUATION_BATCH)
    for places in parts:
        batch = {name: tensor.to(device) for name, tensor in examples.take(places).batch().items()}
        predictions = predict(task.inputs(batch))
        for number in range(len(predictions)):
            own = {name: tensor[number : number + 1] for name, tensor in batch.items()}
            losses.append(float(task.loss(predictions[number : number + 1], own)))
        answers += task.answers(predictions, batch)
    order = torch.cat(parts).argsort().tolist()
    return HeldOut(tuple(losses[place] for place in order), tuple(answers[place] for place in order if answers))


def block_losses(predict: Predict, blocks: torch.Tensor, device: torch.device, task: Task) -> Sequence[float]:
    """The mean loss of each block of token ids [blocks, block_size]."""
    return judge_examples(predict, Examples.of_blocks(blocks), device, task).losses
