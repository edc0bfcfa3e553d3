"""The task of predicting the next token.

A vocabulary makes logits the largest tensor of a step, and a loss in plain torch keeps four more of their size. Here a
block of the batch is done at a time, once for the value and once more for the gradient: besides the logits there is
their gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from dense2moe.upcycle.tasks.language import judge_language
from dense2moe.upcycle.tasks.task import Batch, Task


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; a scalar.

    Logits [B, S, vocabulary] against the ids [B, S] that follow.
    """

    def of_block(number: int, block: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(block[:-1].float(), ids[number, 1:])

    return mean_over_blocks(logits, of_block)


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean divergence of the student from the teacher, in nats; a scalar.

    KL(teacher || student), times the squared temperature. The mean is over the positions that have a next token. Both
    logits are [B, S, vocabulary], and both are divided by the temperature. The square keeps the gradient's size when
    the temperature changes (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). No gradient
    flows into the teacher.
    """
    return mean_over_blocks(
        logits, lambda number, block: block_divergence(block[:-1], teacher_logits[number, :-1], temperature)
    )


def block_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean divergence over the positions of one block, in nats; a scalar.

    Both logits are [S, vocabulary]; see `distillation_loss`.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def mean_over_blocks(logits: torch.Tensor, of_block: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Mean of a loss over blocks of logits [B, S, vocabulary].

    `of_block` gives the loss of one block, by its number and its logits [S, vocabulary].
    """
    return cast(torch.Tensor, cast(Any, _MeanOverBlocks).apply(logits, of_block))


class _MeanOverBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, of_block: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.of_block = of_block
        return torch.stack([of_block(number, block) for number, block in enumerate(logits)]).mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        found = torch.empty_like(logits)
        for number, block in enumerate(logits):
            with torch.enable_grad():
                block = block.detach().requires_grad_()
                (found[number],) = torch.autograd.grad(ctx.of_block(number, block), block, gradient / len(logits))
        return found, None


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "use_cache": False}


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return next_token_loss(logits, batch["input_ids"])


def _divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float, _: Batch) -> torch.Tensor:
    return distillation_loss(logits, teacher, temperature)


NEXT_TOKEN = Task(
    name="text-generation",
    inputs=_inputs,
    loss=_loss,
    divergence=_divergence,
    figures=judge_language,
    unread={"logits_to_keep": 1},
)
