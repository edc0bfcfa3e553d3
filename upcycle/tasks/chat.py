"""The task of saying what an assistant says, given what stands before.

As the next token's, but that only the assistant's tokens are learned and counted; each conversation weighs the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, UNLABELLED
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN, block_divergence, mean_over_blocks
from dense2moe.upcycle.tasks.task import Batch


def _inputs(batch: Batch) -> dict[str, Any]:
    return {IDS: batch[IDS], MASK: batch[MASK], "use_cache": False}


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens, by conversation; in nats."""
    labels = batch[LABELS]

    def of_chat(number: int, chat: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(chat[:-1].float(), labels[number, 1:], ignore_index=UNLABELLED)

    return mean_over_blocks(logits, of_chat)


def _divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float, batch: Batch) -> torch.Tensor:
    learned = batch[LABELS][:, 1:] != UNLABELLED

    def of_chat(number: int, chat: torch.Tensor) -> torch.Tensor:
        places = learned[number]
        return block_divergence(chat[:-1][places], teacher[number, :-1][places], temperature)

    return mean_over_blocks(logits, of_chat)


CHAT = replace(NEXT_TOKEN, inputs=_inputs, loss=_loss, divergence=_divergence)
