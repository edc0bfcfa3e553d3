"""Which experts the tokens of each label go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from dense2moe.upcycle.checkpoints.loaded import count_experts
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.gates.domains import expert_information
from dense2moe.upcycle.tasks.examples import LABELS, MASK, is_of_tokens, labels_of
from dense2moe.upcycle.tasks.head import VALUE, WITHOUT_NAMES, LabelHead
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.expert_choice import choose_in_batches
from dense2moe.upcycle.training.facts import LabelRouting
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.processes import join_processes


@torch.inference_mode()
def measure_labels(mixture: Path, data: Path, task: Task) -> LabelRouting | None:
    """How a mixture routes the held-out tokens of each label.

    A word's label is its first token's, a text's or an image's every real token's. None of a task without labels, of
    values, vectors and answers.
    """
    if task.head is None or set(task.head.kinds) <= WITHOUT_NAMES:
        return None
    model = load_frozen(mixture, task.name, task.head)
    cast(Any, model).to(join_processes().device)
    num_experts = count_experts(model)
    counts = torch.zeros(())
    for batch, chosen in choose_in_batches(model, read_examples(data, "test"), task):
        visits = [F.one_hot(layer, num_experts).sum(1).double() for layer in chosen]
        counts = counts + torch.stack([mark(batch, task.head, len(each)).T @ each for each in visits]).cpu()
    present = counts.sum((0, 2)) > 0
    shares = counts[:, present] / counts[:, present].sum(-1, keepdim=True)  # [layers, labels, experts]
    names = [label for label, is_there in zip(task.head.labels, present.tolist(), strict=True) if is_there]
    return LabelRouting(
        loads={name: tuple(map(tuple, shares[:, place].tolist())) for place, name in enumerate(names)},
        information=tuple(expert_information(shares).tolist()),
    )


def mark(batch: dict[str, torch.Tensor], head: LabelHead, num_tokens: int) -> torch.Tensor:
    """As `mark_labels`, of a head that several tasks may share.

    Values mark nothing.
    """
    if not head.parts:
        return mark_labels(batch, len(head.labels), num_tokens)
    found = []
    for number, part in enumerate(head.parts):
        own = mark_labels({**batch, LABELS: batch[labels_of(number)]}, len(part.labels), num_tokens)
        found.append(torch.zeros_like(own) if part.kind == VALUE else own)
    return torch.cat(found, 1)


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
