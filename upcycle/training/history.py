"""Training history: one record a step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dense2moe.upcycle.gates.facts import LayerRouting

ModelName = Literal["dense", "upcycled", "fine-tuned", "dense continued", "dense, same FLOPs", "branch"]
"""The torch models of a run.

Two are controls, dense models trained beside the mixture; a branch is the dense model continued on one domain alone.
"""


HISTORY_NAME = "history.jsonl"


@dataclass(frozen=True)
class Step:
    """One line of the history; losses are in nats per token.

    A balance loss is 1 when balanced. Steps and tokens are counted over all phases; `phase` is the number of one, from
    0. `flops` are the operations until then, by `training_flops`. What a mixture's branches took counts in its tokens
    and operations. `validation_figure` is the figure that the best weights are chosen by, where it is not the loss.
    """

    model: ModelName
    step: int
    num_tokens: int
    phase: int = 0
    flops: float | None = None
    train_loss: float | None = None
    balance_loss: float | None = None
    z_loss: float | None = None
    sparsity_loss: float | None = None
    domain_loss: float | None = None
    distillation_loss: float | None = None
    validation_loss: float | None = None
    validation_figure: float | None = None
    learning_rate: float | None = None
    layers: tuple[LayerRouting, ...] = ()


def count_costs(history: Iterable[Step], step_flops: Sequence[float], tokens: int, flops: float) -> tuple[Step, ...]:
    """A model's history with the operations until each step.

    `step_flops` are those of a step of each phase; `tokens` and `flops` were spent before the first.
    """
    counted, done = [], 0
    for step in history:
        flops += (step.step - done) * step_flops[step.phase]
        done = step.step
        counted.append(replace(step, num_tokens=step.num_tokens + tokens, flops=flops))
    return tuple(counted)


def last_visits(history: Iterable[Step]) -> tuple[float, ...]:
    """Mean experts of a token by layer, in the last step."""
    steps = [step for step in history if step.model == "fine-tuned" and step.layers]
    return tuple(layer.visits for layer in steps[-1].layers if layer.visits is not None) if steps else ()


def write_history(path: Path, history: Iterable[Step]) -> None:
    """Write the steps as JSON lines, all or none."""
    write_whole(path, "".join(json.dumps(asdict(step)) + "\n" for step in history))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, even when killed."""
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def read_history(path: Path) -> tuple[Step, ...]:
    """The steps that `write_history` wrote."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(Step(**line | {"layers": tuple(_read_layer(layer) for layer in line["layers"])}) for line in lines)


def _read_layer(layer: dict[str, Any]) -> LayerRouting:
    return LayerRouting(**layer | {"load": tuple(layer["load"])})
