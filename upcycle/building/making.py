"""A mixture made by its plan, step by step, and its proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dense2moe.upcycle.building.distance import measure_distances
from dense2moe.upcycle.building.facts import Receipt, SoupLook, SourceDistance
from dense2moe.upcycle.building.hidden_states import RouterReading, read_routers
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.projection import write_projection
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.soup import choose_soup
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import Examples


@dataclass(frozen=True)
class MadeMixture:
    """What a mixture is made of, and how it compares.

    `plan` knows whether the sources' weights differ from the base's; `reading` is None where routers are drawn; `soup`
    are the looks of a greedy soup.
    """

    plan: UpcyclePlan
    distances: tuple[SourceDistance, ...]
    reading: RouterReading | None
    num_tensors: int
    receipt: Receipt
    soup: tuple[SoupLook, ...] = ()


def make_mixture(
    source: Path,
    output: Path,
    plan: UpcyclePlan,
    training: Examples,
    text_base: Path,
    seed: int,
    block_size: int,
    progress: Progress,
    sources: Mapping[str, Path] | None = None,
    held_out: torch.Tensor | None = None,
) -> MadeMixture:
    """Write a planned mixture into an empty directory, and prove it.

    Distances of the sources are measured, a greedy soup of them chosen on blocks of token ids `held_out`, routers read
    from `training` or from files below `text_base`, tensors written and compared with what they were made of, and the
    models compared on text of `block_size` tokens and more.

    Raises:
        UpcycleError: see each of these steps.
    """
    others = dict(sources or {})
    base = open_checkpoint(source)
    opened = open_sources(base, others)
    distances = measure_distances(base, opened, plan.dropped, progress) if others else ()
    plan = replace(plan, sources_differ=not all(distance.equal for distance in distances))
    looks: tuple[SoupLook, ...] = ()
    if others and plan.settings.merging.method == "greedy-soup":
        assert held_out is not None, "nothing to measure a soup on"
        soup, looks = choose_soup(base, opened, plan, held_out, progress)
        plan = replace(plan, soup=soup)
    reading = read_routers(source, plan.settings, training, text_base, seed, progress, plan, others)
    routers = reading.routers if reading else None
    upcycle(source, output, plan.settings, seed, progress, routers, plan, others)
    if reading and reading.projection:
        write_projection(reading.projection, output)
    num_tensors = check_written(source, output, plan, seed, progress, routers, others)
    receipt = write_receipt(source, output, plan, block_size, progress, others)
    return MadeMixture(plan, distances, reading, num_tensors, receipt, looks)
