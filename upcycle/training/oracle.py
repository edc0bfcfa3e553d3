"""What routing is worth: a mixture with its routers overruled.

Beside the routers' choice stand each expert alone, the best of these for each domain, and chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import count_experts
from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.evaluation import losses_by_domain, take_blocks
from dense2moe.upcycle.training.facts import OracleRouting
from dense2moe.upcycle.training.frozen import load_frozen
from dense2moe.upcycle.training.job import load_shape
from dense2moe.upcycle.training.processes import join_processes
from dense2moe.upcycle.training.routing import hooked_routers

_MOST_EXPERTS = 16  # each costs a pass over the text
_MOST_BLOCKS = 16  # of each domain


@torch.inference_mode()
def measure_oracle(mixture: Path, data: Path, task: Task) -> OracleRouting | None:
    """Losses of a mixture on held-out text with its routers overruled.

    Over some blocks of each domain, the same for every row. None where there are fewer than two domains, or more than
    16 experts.
    """
    names, _ = read_domains(data, "test")
    if len(names) < 2 or not 2 <= (num_experts := count_experts(load_shape(mixture, task))) <= _MOST_EXPERTS:
        return None
    model = load_frozen(mixture, task.name, task.head)
    cast(Any, model).to(join_processes().device)
    some = take_blocks(read_examples(data, "test"), len(names), _MOST_BLOCKS)

    def measure() -> dict[str, float]:
        return losses_by_domain(model, some, names, task)

    routed, alone = measure(), []
    for expert in range(num_experts):
        with _overruled(model, partial(_send_all, expert)):
            alone.append(measure())
    generator = torch.Generator().manual_seed(0)
    with _overruled(model, lambda shape: _draw_experts(shape, num_experts, generator)):
        random = measure()
    return OracleRouting(
        num_blocks=len(some),
        routed=routed,
        experts=tuple(alone),
        best_expert={name: min(range(num_experts), key=lambda expert: alone[expert][name]) for name in names},
        random=random,
    )


def _send_all(expert: int, shape: torch.Size) -> torch.Tensor:
    """The same expert for each token, in every place; int64 [tokens, k]."""
    return torch.full(shape, expert)


def _draw_experts(shape: torch.Size, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Different experts for each token, drawn evenly; int64 [tokens, k]."""
    return torch.rand(shape[0], num_experts, generator=generator).topk(shape[1], dim=-1).indices


@contextmanager
def _overruled(model: PreTrainedModel, choose: Callable[[torch.Size], torch.Tensor]) -> Iterator[None]:
    """Within the `with`, `choose` names each token's experts.

    Their weights are equal.
    """

    def overrule(_: int, logits: torch.Tensor, output: Any) -> Any:
        chosen = choose(output[2].shape).to(output[2])
        return logits, torch.full_like(output[1], 1 / chosen.shape[1]), chosen

    with hooked_routers(model, overrule):
        yield
