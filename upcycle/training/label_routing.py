"""Which experts the tokens of each label go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.gates.domains import expert_information
from dense2moe.upcycle.tasks.examples import LABELS, MASK, SPAN_ENDS, SPAN_STARTS, is_of_tokens, labels_of
from dense2moe.upcycle.tasks.head import ENDS_OF_SPAN, VALUE, WITHOUT_NAMES, LabelHead
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.expert_choice import choose_in_batches
from dense2moe.upcycle.training.facts import LabelRouting
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.processes import join_processes

PARTS_OF_WINDOW = ("question", "context", "answer")


@torch.inference_mode()
def measure_labels(mixture: Path, data: Path, task: Task) -> LabelRouting | None:
    """How a mixture routes the held-out tokens of each label.

    A word's label is its first token's, a text's or an image's every real token's; of questions with contexts it is the
    part that a token belongs to. None of a task without labels, of values and vectors.
    """
    if task.head is None or not (labels := name_labels(task.head)):
        return None
    model = load_frozen(mixture, task.name, task.head)
    cast(Any, model).to(join_processes().device)
    counts = torch.zeros(())
    for batch, chosen in choose_in_batches(model, read_examples(data, "test"), task):
        found = [mark(batch, task.head, len(layer)).T @ layer.double() for layer in chosen]
        counts = counts + torch.stack(found).cpu()
    present = counts.sum((0, 2)) > 0
    shares = counts[:, present] / counts[:, present].sum(-1, keepdim=True)  # [layers, labels, experts]
    names = [label for label, is_there in zip(labels, present.tolist(), strict=True) if is_there]
    return LabelRouting(
        loads={name: tuple(map(tuple, shares[:, place].tolist())) for place, name in enumerate(names)},
        information=tuple(expert_information(shares).tolist()),
    )


def name_labels(head: LabelHead) -> tuple[str, ...]:
    """What tokens are told apart by; labels without names tell nothing."""
    if head.kind == ENDS_OF_SPAN:
        return PARTS_OF_WINDOW
    return () if set(head.kinds) <= WITHOUT_NAMES else head.labels


def mark(batch: dict[str, torch.Tensor], head: LabelHead, num_tokens: int) -> torch.Tensor:
    """As `mark_labels`, of a head that several tasks may share.

    Values mark nothing, and ends of answers the parts of a window.
    """
    if head.kind == ENDS_OF_SPAN:
        return mark_labels({**batch, LABELS: number_parts(batch)}, len(PARTS_OF_WINDOW), num_tokens)
    if not head.parts:
        return mark_labels(batch, len(head.labels), num_tokens)
    found = []
    for number, part in enumerate(head.parts):
        own = mark_labels({**batch, LABELS: batch[labels_of(number)]}, len(part.labels), num_tokens)
        found.append(torch.zeros_like(own) if part.kind == VALUE else own)
    return torch.cat(found, 1)


def number_parts(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each token's part of its window, int64 [B, S].

    In the order of `PARTS_OF_WINDOW`; marks around the texts count as the question's.
    """
    in_context = batch[SPAN_ENDS] > batch[SPAN_STARTS]
    places = torch.arange(in_context.shape[1], device=in_context.device)
    first, last = batch[LABELS][:, :, None].unbind(1)
    in_answer = in_context & (places >= first) & (places <= last)
    return in_context.long() + in_answer.long()


def mark_labels(batch: dict[str, torch.Tensor], num_labels: int, num_tokens: int) -> torch.Tensor:
    """Which labels tokens have, float64 [tokens, labels], 0 or 1.

    Tokens stand as `choose_in_batches` gives them. Labels are those of tokens [B, S], of examples [B], or several of
    each example [B, labels].
    """
    labels, mask = batch[LABELS], batch.get(MASK)
    of_tokens = mask is not None and is_of_tokens(labels, mask)
    if of_tokens:
        assert mask is not None
        labels = labels[mask.bool()]
    if labels.ndim == 1:
        labels = F.one_hot(labels.clamp(min=0), num_labels) * (labels >= 0)[:, None]
    marked = labels.double()
    if mask is None:
        return marked.repeat_interleave(num_tokens // len(marked), 0)
    if not of_tokens:
        marked = marked.repeat_interleave(mask.sum(-1), 0)
    return marked.repeat(num_tokens // len(marked), 1)
