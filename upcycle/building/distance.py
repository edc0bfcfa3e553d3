"""How far each source is from the base, by class of tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from dense2moe.upcycle.building.facts import DistanceClass, SourceDistance
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import CLASS_OF_PART
from dense2moe.upcycle.models.table import find_family
from dense2moe.upcycle.progress import Progress

_CLASSES: Mapping[str, DistanceClass] = {
    "experts": "ffn",
    "attention": "attention",
    "norm": "norms",
    "embedding": "embedding",
    "head": "head",
    "bias": "biases",
}


def measure_distances(
    base: Checkpoint, sources: Mapping[str, Checkpoint], dropped: tuple[str, ...], progress: Progress
) -> tuple[SourceDistance, ...]:
    """The distance of every source from the base, in order.

    Every tensor but the `dropped` ones is read once of each, a few million elements at a time, and summed in float64.
    """
    family = find_family(base.config.model_type, base.config.architectures, str(base.directory), base.config)
    names = [name for name in base.entries if name not in dropped]
    norms: dict[DistanceClass, float] = {}
    changes: dict[str, dict[DistanceClass, float]] = {source: {} for source in sources}
    equal = dict.fromkeys(sources, True)
    for number, name in enumerate(names):
        progress("measuring sources", number, len(names))
        kind = _class_of(family, name)
        others = {source: checkpoint.read_chunks(name) for source, checkpoint in sources.items()}
        for chunk in base.read_chunks(name):
            own = chunk.to(torch.float32)
            norms[kind] = norms.get(kind, 0.0) + _square(own)
            for source, change in _changes(own, others):
                square = _square(change)
                changes[source][kind] = changes[source].get(kind, 0.0) + square
                equal[source] &= square == 0 and not bool(change.any())
    progress("measuring sources", len(names), len(names))
    return tuple(
        SourceDistance(
            source, {kind: _ratio(found.get(kind, 0.0), norm) for kind, norm in norms.items()}, equal[source]
        )
        for source, found in changes.items()
    )


def _changes(own: torch.Tensor, others: Mapping[str, Iterator[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each source's next chunk less the base's, one at a time."""
    for source, chunks in others.items():
        yield source, next(chunks).to(torch.float32) - own


def _class_of(family: Architecture, name: str) -> DistanceClass:
    part = family.find_part(name)
    assert part is not None, f"{name} is no part of {family.architecture}"
    return _CLASSES[CLASS_OF_PART[part]]


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _ratio(change: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if change == 0 else math.inf
    return math.sqrt(change / norm)
