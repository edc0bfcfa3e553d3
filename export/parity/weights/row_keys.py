"""Rows of many matrices, looked up by keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass
class RowKeys:
    """Keys [rows, 3] of many matrices' rows, and each matrix's start.

    All rows have the same width.
    """

    owners: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    keys: list[npt.NDArray[np.float32]] = field(default_factory=list)
    total: int = 0

    def add(self, owner: str, keys: npt.NDArray[np.float32]) -> None:
        """Append a matrix's rows."""
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
        """The matrix's number and the row in it, for each index."""
        owner = np.searchsorted(self.starts, places, side="right") - 1
        return owner, places - np.asarray(self.starts)[owner]
