"""Mutations of a user's files: each has a name and takes every choice from a seed, so that both say it again.

    table = tabulate({"config.json": JSON, "model.safetensors": SAFETENSORS})
    Mutation("config.json: drop", 7).apply(folder, table)

What can be done to any file is in `files`; what can be done to files of a format, mostly by structure, is in `formats`,
`tensors` and `graphs`: the file stays well formed, and says something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.robustness.files import FILES, FOLDER, STRAYS, Change, write_stray

Table = Mapping[str, tuple[str, Change]]
"""By name, the file that is changed, relative to the input, and its change."""


@dataclass(frozen=True)
class Mutation:
    """A change of a table by its name, and the seed of whatever it chooses."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name} @{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Mutation:
        """What `str` made of one."""
        name, _, seed = text.rpartition(" @")
        return cls(name, int(seed))

    def apply(self, folder: Path, table: Table) -> None:
        """Change the file below `folder`."""
        file, change = table[self.name]
        change(folder / file, Random(f"{self.name} {self.seed}"))


def tabulate(files: Mapping[str, Mapping[str, Change]], folder: str | None = None) -> Table:
    """All that can be done to each file, its own changes and those of any file.

    And to the folder of a model, to which strays can be added.
    """
    table = {
        f"{file}: {what}": (file, change)
        for file, changes in files.items()
        for what, change in (FILES | dict(changes)).items()
    }
    if folder is not None:
        table |= {f"{folder}: {what}": (folder, change) for what, change in FOLDER.items()}
        table |= {f"{folder}: stray {name!a}": (f"{folder}/{name}", write_stray) for name in STRAYS}
    return table
