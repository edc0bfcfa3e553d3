"""Weights of several sources merged into one: pure tensor functions.

Every method adds something to the base that is made of the sources' changes, each the source minus the base (task
vectors, Ilharco et al. 2023). So sources that equal the base give the base bit for bit, by every method.
Changes come one after the other, and one is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch


def average_changes(changes: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """The mean change of `count` models, some of them unchanged.

    Changes are float32, all of one shape.
    """
    return sum_changes(changes, 1.0 / count)


def sum_changes(changes: Iterable[torch.Tensor], weight: float) -> torch.Tensor:
    """The sum of changes times `weight`: task arithmetic (Ilharco et al. 2023).

    Changes are float32, all of one shape.
    """
    total = None
    for change in changes:
        total = change.clone() if total is None else total.add_(change)
    assert total is not None, "nothing to merge"
    return total.mul_(weight)


def apply_change(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The float32 base with a change added.

    Where nothing changes its very bits stay: -0 + 0 would be 0.
    """
    return torch.where(change == 0, base, base + change)


def elect_changes(changes: Iterable[torch.Tensor], thresholds: Sequence[float], weight: float) -> torch.Tensor:
    """The disjoint mean of trimmed changes times `weight`: TIES.

    Yadav et al. 2023, algorithm 1. A change keeps its elements of at least its threshold in size (trim). Each element's
    sign is that of the sum of what is kept (elect), and the mean is over what is kept and has this sign (merge).
    Float32, all of one shape.
    """
    sums: dict[bool, torch.Tensor] = {}
    counts: dict[bool, torch.Tensor] = {}
    for change, threshold in zip(changes, thresholds, strict=True):
        kept = torch.where(change.abs() >= threshold, change, 0.0)
        for positive in (True, False):
            side = kept.clamp(min=0.0) if positive else kept.clamp(max=0.0)
            if positive not in sums:
                sums[positive], counts[positive] = torch.zeros_like(change), torch.zeros_like(change)
            sums[positive] += side
            counts[positive] += side != 0
    total = sums[True] + sums[False]
    means = {side: sums[side] / counts[side].clamp(min=1.0) for side in sums}
    return torch.where(total > 0, means[True], torch.where(total < 0, means[False], 0.0)).mul_(weight)


def drop_elements(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """A change thinned at random to `density`, and enlarged: DARE.

    Yu et al. 2024. Each element is kept with that probability and divided by it, so that its expectation stays.
    Float32.
    """
    kept = torch.rand(change.shape, generator=generator) < density
    return torch.where(kept, change / density, 0.0)


def find_threshold(read: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """The least size among the largest `density` of all elements.

    Exact. `read` gives a float32 tensor in chunks and is called twice: bits of positive floats are in the floats'
    order, so the first pass counts the upper half of the 31 bits, and the second the lower half where the upper one is
    right. Elements of equal size are all kept. Memory does not grow with the tensor.
    """
    upper = _count((bits >> 16 for bits in map(_bits, read())), 1 << 15)
    wanted = max(1, round(density * int(upper.sum())))
    high, above = _locate(upper, wanted)
    lower = _count((bits[bits >> 16 == high] & 0xFFFF for bits in map(_bits, read())), 1 << 16)
    low, _ = _locate(lower, wanted - above)
    return float(torch.tensor([high << 16 | low], dtype=torch.int32).view(torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.abs().reshape(-1).contiguous().view(torch.int32)


def _count(numbers: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """How often each number below `length` occurs."""
    counts = torch.zeros(length, dtype=torch.int64)
    for chunk in numbers:
        counts += torch.bincount(chunk, minlength=length)
    return counts


def _locate(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The least of the `wanted` largest numbers; how many are larger."""
    from_largest = counts.flip(0).cumsum(0)
    place = int((from_largest >= wanted).nonzero()[0])
    number = len(counts) - 1 - place
    return number, int(from_largest[place] - counts[number])
