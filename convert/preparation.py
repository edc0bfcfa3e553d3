"""What is known before work begins, and one stage's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dense2moe.convert.recipe.loading import LoadedRecipe
from dense2moe.convert.recipe.records import Recipe
from dense2moe.export.parity.answers.examples import TaskFile
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.data.config import name_domains
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.config import FinetuneConfig

Facts = dict[str, Any]
Each = Literal["source", "domain", "variant"]
"""Over what a stage may be repeated."""


@dataclass(frozen=True)
class FineTuned:
    """A checkpoint or an adapter that was fine-tuned from the dense one.

    `hub` is its id on the hub. `files` are SHA-256 of what it is read from, `remarks` tell how it differs from the base
    beside its weights.
    """

    origin: str
    hub: str | None
    checkpoint: Checkpoint
    files: Mapping[str, str]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Preparation:
    """What is known before work begins: checkpoint, plan and recipe.

    Where the dense checkpoint is, and what is in it. `last_stage` is the last that can be run for this target, with the
    reason; None where all can. `license` is what the dense model's own card says of its licence. By label:
    `artifact_bytes`, of those that are large; `scratch_bytes`, what a stage needs on the disk beside its artifact while
    it runs; `memory_bytes`, the most memory that it is planned to have resident. `remarks` are lines that the user
    should read, and that stop nothing.
    """

    loaded: LoadedRecipe
    origin: str
    checkpoint: Checkpoint
    plan: UpcyclePlan
    source_files: Mapping[str, str]
    data_files: Mapping[str, str]
    domain_files: Mapping[str, str]
    lowerings: Mapping[Variant, tuple[str, ...]]
    artifact_bytes: Mapping[str, int]
    scratch_bytes: Mapping[str, int]
    last_stage: tuple[str, str] | None
    license: Mapping[str, str]
    tasks: tuple[TaskFile, ...] = ()
    task_files: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    sources: Mapping[str, FineTuned] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The settings."""
        return self.loaded.recipe

    @property
    def finetune(self) -> FinetuneConfig | None:
        """The training settings, with the routers' losses settled.

        These follow from data and experts.
        """
        if self.recipe.finetune is None:
            return None
        upcycle = self.plan.settings
        owning = upcycle.find_owning(name_domains(self.recipe.data.source), self.plan.sources)
        return self.recipe.finetune.settle(len(owning), upcycle.num_experts)

    @property
    def items(self) -> Mapping[Each, Sequence[str]]:
        """The items that a stage is repeated over.

        The one source, the domains that have branches, or the variants.
        """
        return {"source": (self.origin,), "domain": self.recipe.branched, "variant": self.recipe.variants}


@dataclass(frozen=True)
class StageRun:
    """One run of one stage: its directories and the preparation.

    The directories that it reads and writes. `item` is the variant, domain or source of a stage that is repeated.
    `inputs` are directories, and `input_facts` and `keys` what their manifests say, each by the stage's name, or by its
    label where all of its artifacts are gathered. `scratch` outlives a killed run; it may not exist yet, and goes when
    the artifact is sealed.
    """

    preparation: Preparation
    item: str | None
    inputs: Mapping[str, Path]
    input_facts: Mapping[str, Facts]
    keys: Mapping[str, str]
    output: Path
    scratch: Path
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """The settings."""
        return self.preparation.recipe

    @property
    def variant(self) -> Variant:
        """The variant of a stage that is repeated over them."""
        assert self.item in self.recipe.variants, f"item {self.item!r}"
        return self.item
