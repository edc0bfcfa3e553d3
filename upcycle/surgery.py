"""Surgery: a dense checkpoint in, a mixture of experts out, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from upcycle.checkpoint import Checkpoint, copy_companions, open_checkpoint, write_tensors
from upcycle.config import UpcycleConfig
from upcycle.experts import add_noise, seeded_generator
from upcycle.mapping import CopyExpert, DrawRouter, Keep, UpcyclePlan, plan_upcycle
from upcycle.progress import Progress
from upcycle.router import draw_router


def upcycle(source: Path, output: Path, config: UpcycleConfig, seed: int, progress: Progress) -> UpcyclePlan:
    """Write the mixture of experts of the checkpoint in `source` into the empty directory `output`; returns the plan that was carried out.

    Memory: one tensor, and one more where noise is added, whatever the model's size.

    Raises:
        UpcycleError: the source cannot be upcycled (nothing is written then).
        OSError: the disk is full or not writable.
    """
    checkpoint = open_checkpoint(source)
    plan = plan_upcycle(checkpoint, config)
    plan.target_config.save_pretrained(output)
    copy_companions(source, output)
    specs = [write.spec for write in plan.writes]
    write_tensors(output, specs, _make_tensors(checkpoint, plan, config, seed, progress), config.shard_bytes)
    return plan


def _make_tensors(
    checkpoint: Checkpoint, plan: UpcyclePlan, config: UpcycleConfig, seed: int, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    held_name, held = "", torch.empty(0)
    for number, write in enumerate(plan.writes):
        match write.rule:
            case Keep(source) | CopyExpert(source) | DrawRouter(norm=source):
                if source != held_name:
                    held_name, held = source, checkpoint.read(source)
        name = write.spec.name
        match write.rule:
            case Keep():
                tensor = held
            case CopyExpert():
                tensor = add_noise(held, config.experts.noise, seeded_generator(seed, name))
            case DrawRouter():
                tensor = draw_router(config.num_experts, held, config.router.logit_std, seeded_generator(seed, name))
        yield name, tensor
        progress("writing tensors", number + 1, len(plan.writes))
