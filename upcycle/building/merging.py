"""Weights of several sources merged into one: pure tensor functions.

Every method adds something to the base that is made of the sources' changes, which are what each differs by from the
base (task vectors, Ilharco et al. 2023). So sources that equal the base give the base bit for bit, by every method.
Changes come one after the other, and one is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

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
