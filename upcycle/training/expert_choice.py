"""Experts that the tokens of examples visit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import selection_biases
from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.gates.scores import visit_experts
from dense2moe.upcycle.tasks.examples import MASK, Examples
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.routing import SaidLogits, hooked_routers, read_gate

Chosen = tuple[torch.Tensor, ...]
"""Of each router the experts that every real token visits, bool [tokens, E]."""


def choose_in_batches(
    model: PreTrainedModel, examples: Examples, task: Task
) -> Iterator[tuple[dict[str, torch.Tensor], Chosen]]:
    """Batches of examples, each with the experts of its tokens.

    Tokens stand as in the batch, its padding left out. Of a router that several layers share, all tokens of its first
    layer come first, or all of the first example where nothing is padded.
    """
    said = SaidLogits()
    biases, gate = tuple(selection_biases(model)), read_gate(model)
    with hooked_routers(model, lambda number, logits, _: said.add(number, logits)):
        for read in examples.batches(EVALUATION_BATCH):
            batch = {name: tensor.to(model.device) for name, tensor in read.items()}
            model(**task.inputs(batch))
            pairs = zip(said.take(len(next(iter(batch.values()))), batch.get(MASK)), biases, strict=True)
            yield batch, tuple(visit_experts(logits, gate, bias) for logits, bias in pairs)
