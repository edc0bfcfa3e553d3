"""Held-out examples: the loss of each, and what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.tasks.answer import AnyAnswer
from dense2moe.upcycle.tasks.examples import LABELS, Examples
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.task import Batch, Task

Predict = Callable[[dict[str, Any]], torch.Tensor]
"""Predictions [B, ...] of a model that is called with `Task.inputs`."""


@dataclass(frozen=True)
class HeldOut:
    """Mean loss of each example, and its answer if any."""

    losses: tuple[float, ...]
    answers: tuple[AnyAnswer, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss over examples."""
        return fmean(self.losses)

    def figures(self, task: Task) -> tuple[Figure, ...]:
        """The task's figures, the most important first."""
        return task.figures(self.losses, self.answers)


def tell_nobody(_: Examples) -> None:
    """Nothing is done before a batch is read."""


@torch.no_grad()  # not inference_mode: what FSDP gathers in its first pass it keeps for training
def judge_examples(
    predict: Predict,
    examples: Examples,
    device: torch.device,
    task: Task,
    before: Callable[[Examples], None] = tell_nobody,
) -> HeldOut:
    """Loss and answer of each example; every example stands alone.

    But of tasks that judge them jointly. They are read in batches of about the same length, each told to `before`, and
    told in the order that they have.
    """
    parts = examples.parts_by_length(EVALUATION_BATCH)
    order = torch.cat(parts).argsort()
    passes = _predict_parts(predict, [examples.take(places) for places in parts], device, task, before)
    if task.jointly is not None:
        kept = torch.cat([task.jointly.keep(predictions, batch).cpu() for predictions, batch in passes])
        judged = task.jointly.judge(kept[order], examples.tensors[LABELS])
        return HeldOut(tuple(judged[0]), tuple(judged[1]))
    losses: list[float] = []
    answers: list[AnyAnswer] = []
    for predictions, batch in passes:
        for number in range(len(predictions)):
            own = {name: tensor[number : number + 1] for name, tensor in batch.items()}
            losses.append(float(task.loss(predictions[number : number + 1], own)))
        answers += task.answers(predictions, batch)
    places = order.tolist()
    return HeldOut(tuple(losses[place] for place in places), tuple(answers[place] for place in places if answers))


def _predict_parts(
    predict: Predict, parts: Sequence[Examples], device: torch.device, task: Task, before: Callable[[Examples], None]
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Predictions of each part, and the batch that they are of."""
    for part in parts:
        before(part)
        batch = {name: tensor.to(device) for name, tensor in part.batch().items()}
        yield predict(task.inputs(batch)), batch


def block_losses(predict: Predict, blocks: torch.Tensor, device: torch.device, task: Task) -> Sequence[float]:
    """The mean loss of each block of token ids [blocks, block_size]."""
    return judge_examples(predict, Examples.of_blocks(blocks), device, task).losses
