"""A figure: one number that a model is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Figure:
    """A number with its name, unit and which way is better.

    The unit is empty for a ratio or a share. Of a model's figures the first is the one that a table shows and that
    limits are set for.
    """

    name: str
    value: float
    unit: str
    better: Better

    @property
    def is_score(self) -> bool:
        """Whether it is a score, such as accuracy or F1."""
        return self.better == "higher" and not self.unit

    def gain(self, other: float) -> float:
        """Improvement over `other`, in the figure's unit; negative where worse."""
        return other - self.value if self.better == "lower" else self.value - other
