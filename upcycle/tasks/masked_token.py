"""The task of predicting masked tokens, as BERT is pretrained.

Of each block 15 % of the tokens are chosen; 8 of 10 of them are replaced by the mask, one by a random token, and one
stays (Devlin et al. 2019, "BERT", section 3.1). Which ones follows from the block itself: a block is masked alike
whenever it is read, so that losses of two models, and of two looks at one, compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.language import perplexity
from dense2moe.upcycle.tasks.next_token import block_divergence, mean_over_blocks
from dense2moe.upcycle.tasks.task import Batch, Task

_SHARE = 0.15
_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """How a tokenizer's tokens are masked.

    By the mask, never special tokens; `vocab_size` is how many tokens there are.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int

    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """The chosen positions of blocks [B, S], bool [B, S].

        At least one of each block.
        """
        return torch.stack([self._of_block(block)[0] for block in ids])

    def corrupt(self, ids: torch.Tensor) -> torch.Tensor:
        """Blocks [B, S] as the model reads them."""
        return torch.stack([self._of_block(block)[1] for block in ids])

    def _of_block(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        digest = hashlib.sha256(block.cpu().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order, kind, others = (torch.rand(len(block), generator=generator) for _ in range(3))
        special = torch.isin(block.cpu(), torch.tensor(self.special_ids, dtype=block.dtype))
        order[special] = 2.0  # behind all others
        chosen = order < _SHARE
        chosen[order.argmin()] = True
        read = block.cpu().clone()
        read[chosen & (kind < _MASKED)] = self.mask_id
        is_random = chosen & (kind >= _MASKED) & (kind < _MASKED + _RANDOM)
        read[is_random] = (others * self.vocab_size).long()[is_random]
        return chosen.to(block.device), read.to(block.device)


def read_masking(tokenizer: PreTrainedTokenizerBase, where: str) -> Masking:
    """The masking that a tokenizer allows.

    Raises:
        UpcycleError: it has no mask; `where` names it.
    """
    if tokenizer.mask_token_id is None:
        raise UpcycleError(
            f"{where}: the tokenizer has no mask_token, and the model predicts masked tokens; give it one, such as "
            "[MASK], or switch fine-tuning off"
        )
    return Masking(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer))


def masked_token(masking: Masking) -> Task:
    """The task with a tokenizer's masking."""

    def inputs(batch: Batch) -> dict[str, Any]:
        return {"input_ids": masking.corrupt(batch["input_ids"])}

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        ids = batch["input_ids"]
        chosen = masking.choose(ids)

        def of_block(number: int, block: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(block[chosen[number]].float(), ids[number][chosen[number]])

        return mean_over_blocks(logits, of_block)

    def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, _: Batch) -> torch.Tensor:
        return mean_over_blocks(
            logits, lambda number, block: block_divergence(block, teacher_logits[number], temperature)
        )

    return Task(
        name="fill-mask",
        inputs=inputs,
        loss=loss,
        divergence=divergence,
        figures=_figures,
        unread={},
        decodes=False,
    )


def _figures(losses: Sequence[float], _: Sequence[LabelAnswer]) -> tuple[Figure, ...]:
    """Perplexity of masked tokens, and their mean loss in nats."""
    loss = fmean(losses)
    return (Figure("masked perplexity", perplexity(loss), "", "lower"), Figure("masked loss", loss, "nats", "lower"))
