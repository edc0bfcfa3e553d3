"""Settings of branches: the dense model continued on each domain alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dense2moe.upcycle.record import Record
from dense2moe.upcycle.training.config import FinetuneConfig

_SHARE = 0.1
"""Of all training tokens, what branches have by default: with more of them the mixture ended worse."""
_STEPS_ALONE = 20  # of a branch without fine-tuning after it


class BranchConfig(Record):
    """The dense model continued on each domain by itself (Branch-Train-MiX)."""

    steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps of each branch; by default as many as give all branches together a tenth of the "
        "training's tokens, and 20 without fine-tuning.",
    )
    batch_size: PositiveInt = Field(8, description="Blocks in a step, over all devices.")
    learning_rate: PositiveFloat = Field(3e-4, description="Peak learning rate of AdamW.")
    train: Literal["all", "experts"] = Field(
        "all",
        description="What learns: 'all', or 'experts', the FFNs that will be experts, so that the branches share "
        "everything else with the dense model.",
    )
    eval_steps: PositiveInt = Field(
        50,
        description="Steps between two evaluations on the domain's validation split, and between two checkpoints; the "
        "best weights are kept.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="As `finetune.precision`.")

    def count_steps(self, finetune: FinetuneConfig | None, num_domains: int) -> BranchConfig:
        """These settings with the steps of each branch.

        Unchanged where they say themselves how many there are.
        """
        if self.steps is not None:
            return self
        steps = _STEPS_ALONE
        if finetune is not None:
            blocks = finetune.batch_size * sum(phase.steps for phase in finetune.resolve_phases())
            steps = round(blocks * _SHARE / (1 - _SHARE) / num_domains / self.batch_size)
        return self.model_copy(update={"steps": max(1, steps)})

    def as_phase(self) -> FinetuneConfig:
        """One phase of training with these settings, whose steps are known."""
        assert self.steps is not None, "how many steps a branch has is not counted yet"
        return FinetuneConfig(
            train=self.train,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(10, self.steps // 10),
            eval_steps=self.eval_steps,
            precision=self.precision,
            control=False,
        )
