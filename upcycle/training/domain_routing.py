"""Which experts the held-out text of each domain goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import selection_biases
from dense2moe.upcycle.data.blocks import read_blocks, read_domains
from dense2moe.upcycle.footprint import EVALUATION_BATCH
from dense2moe.upcycle.gates.balance import expert_load
from dense2moe.upcycle.gates.domains import expert_information
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.facts import DomainRouting
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.processes import join_processes
from dense2moe.upcycle.training.routing import SaidLogits, hooked_routers, read_gate


@torch.inference_mode()
def measure_domains(mixture: Path, data: Path, task: Task) -> DomainRouting | None:
    """How a mixture routes the held-out text of each domain.

    None where there are fewer than two domains with two blocks.
    """
    names, domains = read_domains(data, "test")
    blocks = read_blocks(data, "test")
    parts = {name: blocks[domains == number] for number, name in enumerate(names)}
    if len(parts) < 2 or min(map(len, parts.values())) < 2:
        return None
    model = load_frozen(mixture, task.name)
    cast(Any, model).to(join_processes().device)
    halves = {name: (_load(model, part[0::2], task), _load(model, part[1::2], task)) for name, part in parts.items()}
    wholes = {
        name: (len(part[0::2]) * halves[name][0] + len(part[1::2]) * halves[name][1]) / len(part)
        for name, part in parts.items()
    }
    pairs = [(wholes[a], wholes[b]) for place, a in enumerate(names) for b in names[place + 1 :]]
    return DomainRouting(
        loads={name: tuple(map(tuple, load.tolist())) for name, load in wholes.items()},
        between=_mean_distance(pairs),
        within=_mean_distance(list(halves.values())),
        information=tuple(expert_information(torch.stack(list(wholes.values()), 1)).tolist()),
    )


def _load(model: PreTrainedModel, blocks: torch.Tensor, task: Task) -> torch.Tensor:
    """Load of each expert of each layer; float32 [layers, num_experts].

    The load is measured over blocks of token ids.
    """
    said = SaidLogits()
    biases, gate = tuple(selection_biases(model)), read_gate(model)
    found = []
    with hooked_routers(model, lambda number, logits, _: said.add(number, logits)):
        for batch in blocks.split(EVALUATION_BATCH):
            model(**task.inputs({"input_ids": batch.to(model.device)}))
            pairs = zip(said.take(len(batch)), biases, strict=True)
            loads = [expert_load(logits, gate, bias) for logits, bias in pairs]
            found.append(torch.stack(loads).cpu() * len(batch))
    return torch.stack(found).sum(0) / len(blocks)


def _mean_distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
    """Each layer's mean distance between pairs of loads; [layers].

    Half the sum of absolute differences of two loads [layers, num_experts].
    """
    return tuple((torch.stack([(a - b).abs().sum(-1) for a, b in pairs]).mean(0) / 2).tolist())
