"""The subject of parity: a package and the models beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dense2moe.export.parity.answers.examples import TaskFile
from dense2moe.export.variant import Variant
from dense2moe.upcycle.tasks.examples import Examples


@dataclass(frozen=True)
class ParitySubject:
    """A package, twin, fine-tuned model, and held-out blocks [N, block_size].

    Blocks hold token ids. `rounds_activations`: the graph computes in 16 bits or with 8-bit activations. `exact_twin`:
    the twin has the very weights of the package; without it the package is judged by its figures, by what `tasks`
    score, and by itself. `finetuned_losses` are the fine-tuned model's mean losses of all blocks in float32, where they
    are known already. `examples` are what a model with labels is judged by, in the place of blocks.
    `counted` [N, block_size] has the tokens of blocks that figures are of, where these are not all.
    """

    package: Path
    twin: Path
    finetuned: Path
    blocks: torch.Tensor
    variant: Variant
    rounds_activations: bool
    exact_twin: bool = True
    tasks: Sequence[TaskFile] = ()
    finetuned_losses: Sequence[float] | None = None
    examples: Examples | None = None
    counted: torch.Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether the graph computes in float32 with the twin's weights."""
        return self.exact_twin and not self.rounds_activations
