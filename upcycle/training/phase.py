"""A phase of training: its settings, its text, and what it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import count_experts
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.history import ModelName, Step
from dense2moe.upcycle.training.processes import join_processes
from dense2moe.upcycle.training.sharding import is_divided

_MAX_REPEATS = 16  # copies of a block in one step


@dataclass(frozen=True)
class Phase:
    """One phase of one model's training.

    number: of the phase, from 0. first_step: steps of the phases before it; total_steps: of all phases.
    num_domains: how many the text has. sparse_layers: numbers of the layers that have experts in the mixture.
    order: the places of the training blocks in the order in which they are met, as many as steps * batch_size; their
    own order where there is none. dtype: what the weights are rounded to in the end.
    """

    model: ModelName
    number: int
    settings: FinetuneConfig
    train: Examples
    validation: Examples
    num_domains: int
    first_step: int
    total_steps: int
    sparse_layers: tuple[int, ...]
    precision: str
    seed: int
    order: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    task: Task = NEXT_TOKEN

    @property
    def key(self) -> str:
        """Where the recipe has these settings."""
        return "branch" if self.model == "branch" else "finetune"

    @property
    def blocks_per_part(self) -> int:
        """Blocks that one process reads at once."""
        settings = self.settings
        return settings.batch_size // settings.gradient_accumulation_steps // int(join_processes().num_processes)


@dataclass(frozen=True)
class Trained:
    """Results of training besides the weights.

    best_step: the step whose weights were kept; the one before the first step where no evaluation was better than the
    start. seconds: in steps, by the clock. compute_seconds: the processor's, of all threads, so that they do not grow
    with what else the machine does; by the clock where a GPU computes.
    """

    history: tuple[Step, ...]
    best_step: int
    last_step: int
    seconds: float
    compute_seconds: float


def check_settings(model: PreTrainedModel, settings: FinetuneConfig, num_domains: int, key: str = "finetune") -> None:
    """Refuse settings that this model, domains or number of processes cannot meet.

    Of the model the shape is enough. `key` is where the recipe has the settings.

    Raises:
        UpcycleError: as `is_divided`, the batch does not divide by the number of processes, or the domains do not
            divide the experts.
    """
    is_divided()  # refuses what it cannot be
    processes = join_processes().num_processes
    if settings.batch_size % (settings.gradient_accumulation_steps * processes):
        raise UpcycleError(
            f"{key}.batch_size is {settings.batch_size}; it must be a multiple of gradient_accumulation_steps × "
            "processes, "
            f"which is {settings.gradient_accumulation_steps} × {processes}"
        )
    num_experts = count_experts(model)
    wish = describe_domain_wish(settings)
    if wish is not None and num_experts and (num_domains < 2 or num_experts % num_domains):
        raise UpcycleError(
            f"finetune: {wish}, the data has {num_domains} domains and a layer {num_experts} experts; the domains must "
            "be 2 or more and divide the experts evenly; give data.source of kind 'domains'"
        )


def check_repeats(batch_size: int, num_blocks: int, where: str, whose: str) -> None:
    """Refuse a batch with too many copies of a block.

    `where` names the settings, `whose` the blocks, in a refusal.

    Raises:
        UpcycleError: there would be more than 16 of a block in one step.
    """
    if batch_size > (most := _MAX_REPEATS * num_blocks):
        raise UpcycleError(
            f"{where}.batch_size is {batch_size}; it must be at most {most}, {_MAX_REPEATS} times the blocks of "
            f"{whose}; lower it, or give more text"
        )


def describe_domain_wish(settings: FinetuneConfig) -> str | None:
    """The setting that gives domains their own experts, in words, or None."""
    if settings.routing == "by-domain":
        return "routing is by-domain"
    if settings.domain_coefficient:
        return f"domain_coefficient is {settings.domain_coefficient:g}"
    return None
