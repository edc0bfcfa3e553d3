"""Rows divided into splits: what is held out is never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from dense2moe.upcycle.data.held_out import SPLITS, Split, split_of

_SHARE = (10, 100)  # of the rows, for each split that is not given


class Keyed(Protocol):
    """A row with a key of its own, and what is right."""

    @property
    def key(self) -> str:
        """Equal for rows that must not be divided."""

    @property
    def answer(self) -> Any:
        """What is right, as JSON has it."""


Row = TypeVar("Row", bound=Keyed)


@dataclass(frozen=True)
class Labelled(Generic[Row]):
    """Rows by split; `num_shared` training rows were held out too."""

    rows: Mapping[Split, Sequence[Row]]
    num_shared: int


def divide_rows(given: Mapping[Split, Sequence[Row]], group: Callable[[Row], str] = attrgetter("key")) -> Labelled[Row]:
    """Rows of every split; missing splits come from training rows.

    Of these, rows of one `group` fall together.
    Training rows whose text is held out are left out, and so are validation rows whose text is in the test split.
    """
    wanted = [split for split in reversed(SPLITS[1:]) if split not in given]
    rows: dict[Split, list[Row]] = {split: list(given.get(split, ())) for split in SPLITS}
    rows["train"] = []
    for row in given["train"]:
        rows[split_of(group(row), wanted, *_SHARE)].append(row)
    held_out = {row.key for split in SPLITS[1:] for row in rows[split]}
    own = [row for row in rows["train"] if row.key not in held_out]
    num_shared = len(rows["train"]) - len(own)
    rows["train"] = own
    tested = {row.key for row in rows["test"]}
    rows["validation"] = [row for row in rows["validation"] if row.key not in tested]
    return Labelled(rows, num_shared)
