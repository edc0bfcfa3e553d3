"""A figure: one number that a model is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figure:
    """A number with its name, its unit (empty for a ratio or a share) and which way is better.

    Of a model's figures the first is the one that a table shows and that limits are set for.
    """

    name: str
    value: float
    unit: str
    better: Better

    def gain(self, other: float) -> float:
        """By how much this figure is better than `other`, in its own unit; negative where it is worse."""
        return other - self.value if self.better == "lower" else self.value - other
