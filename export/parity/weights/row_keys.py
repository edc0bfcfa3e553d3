"""Rows of many matrices, by their keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass
class RowKeys:
    """Rows of one width from many matrices: their keys [rows, 3], and where each matrix begins."""

    owners: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    keys: list[npt.NDArray[np.float32]] = field(default_factory=list)
    total: int = 0

    def add(self, owner: str, keys: npt.NDArray[np.float32]) -> None:
        """Put rows of a matrix behind the others."""
        if not self.owners or self.owners[-1] != owner:
            self.owners.append(owner)
            self.starts.append(self.total)
        self.keys.append(keys)
        self.total += len(keys)

    def joined(self) -> npt.NDArray[np.float32]:
        """The keys of all rows."""
        if len(self.keys) > 1:
            self.keys = [np.concatenate(self.keys)]
        return self.keys[0]

    def locate(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """By place, the number of its owner and the row in it."""
        owner = np.searchsorted(self.starts, places, side="right") - 1
        return owner, places - np.asarray(self.starts)[owner]
