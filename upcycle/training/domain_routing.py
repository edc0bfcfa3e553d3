"""Which experts the held-out text of each domain goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.gates.domains import expert_information
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.expert_choice import choose_in_batches
from dense2moe.upcycle.training.facts import DomainRouting
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.processes import join_processes


@torch.inference_mode()
def measure_domains(mixture: Path, data: Path, task: Task) -> DomainRouting | None:
    """How a mixture routes the held-out text of each domain.

    None where there are fewer than two domains with two blocks.
    """
    names, examples = read_domains(data, "test")[0], read_examples(data, "test")
    parts = {name: examples.of_domain(number) for number, name in enumerate(names)}
    if len(parts) < 2 or min(map(len, parts.values())) < 2:
        return None
    model = load_frozen(mixture, task.name, task.head)
    cast(Any, model).to(join_processes().device)
    halves = {
        name: tuple(_count(model, part.take(slice(n, None, 2)), task) for n in range(2)) for name, part in parts.items()
    }
    wholes = {name: _shares(first + second) for name, (first, second) in halves.items()}
    pairs = [(wholes[a], wholes[b]) for place, a in enumerate(names) for b in names[place + 1 :]]
    return DomainRouting(
        loads={name: tuple(map(tuple, load.tolist())) for name, load in wholes.items()},
        between=_mean_distance(pairs),
        within=_mean_distance([(_shares(first), _shares(second)) for first, second in halves.values()]),
        information=tuple(expert_information(torch.stack(list(wholes.values()), 1)).tolist()),
    )


def _shares(counts: torch.Tensor) -> torch.Tensor:
    """Load of each expert, float32 [layers, num_experts], from its tokens."""
    return counts / counts.sum(-1, keepdim=True)


def _count(model: PreTrainedModel, examples: Examples, task: Task) -> torch.Tensor:
    """Real tokens that visit each expert of each layer; float64 [layers, num_experts]."""
    found = [
        torch.stack([layer.sum(0) for layer in chosen]).cpu() for _, chosen in choose_in_batches(model, examples, task)
    ]
    return torch.stack(found).sum(0).double()


def _mean_distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
    """Each layer's mean distance between pairs of loads; [layers].

    Half the sum of absolute differences of two loads [layers, num_experts].
    """
    return tuple((torch.stack([(a - b).abs().sum(-1) for a, b in pairs]).mean(0) / 2).tolist())
