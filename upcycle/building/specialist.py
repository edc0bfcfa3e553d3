"""Specialists: dense models of the merged weights and one source's FFNs.

A text that only one source's experts serve is read so by the mixture: what is no expert is merged, and each FFN is that
source's. Nothing of it is written; a tensor is made when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from dense2moe.upcycle.building.merger import Merger
from dense2moe.upcycle.building.pieces import ExpertPart, Merged, Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES
from dense2moe.upcycle.models.parts import layer_of


class Trunk:
    """The merged tensors, which all specialists share.

    Arithmetic is not folded in. Those of one layer are kept until another layer's are read, since all specialists read
    a layer in turn.
    """

    def __init__(self, checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int) -> None:
        self._merger = Merger(checkpoints, plan, seed)
        self._kept: tuple[int | None, dict[str, torch.Tensor]] = (None, {})
        self.parts: dict[str, list[Slice]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for write in plan.writes:
            for piece in write.pieces:
                if isinstance(piece, Merged):
                    self.parts.setdefault(piece.rows.source, []).append(piece.rows)
                    self.dtypes[piece.rows.source] = write.spec.dtype
        for parts in self.parts.values():
            parts.sort(key=lambda rows: rows.start)

    def read(self, name: str) -> torch.Tensor:
        """A merged tensor, in the dtype that the mixture has it in."""
        layer = layer_of(name)
        if self._kept[0] != layer:
            self._kept = (layer, {})
        kept = self._kept[1]
        if name not in kept:
            kept[name] = torch.cat(list(self._merge(name)))
        return kept[name]

    def pick_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a merged tensor, by their numbers, in their order.

        All are merged, chunk by chunk, and the others dropped: thresholds and what is drawn are of whole tensors.
        """
        found, places, start = [], [], 0
        for chunk in self._merge(name):
            here = torch.nonzero((rows >= start) & (rows < start + len(chunk))).flatten()
            found.append(chunk[rows[here] - start])
            places.append(here)
            start += len(chunk)
        return torch.cat(found)[torch.cat(places).argsort()]

    def _merge(self, name: str) -> Iterator[torch.Tensor]:
        for part in self.parts[name]:
            yield from (chunk.to(self.dtypes[name], copy=True) for chunk in self._merger.merge(part))


@dataclass(frozen=True)
class Specialist(Checkpoint):
    """The base with merged weights, and one source's FFNs.

    These stand where the mixture has experts. A shared expert counts for nothing here: the FFN is the source's whole.
    """

    trunk: Trunk | None = None
    experts: Mapping[str, Checkpoint] = field(default_factory=dict)

    def is_stored(self, name: str) -> bool:
        """Whether the tensor lies in a file as it is."""
        if name in self.experts:
            return self.experts[name].is_stored(name)
        return self.trunk is None or name not in self.trunk.parts

    def read(self, name: str) -> torch.Tensor:
        """Read or merge one tensor."""
        if name in self.experts:
            return self.experts[name].read(name)
        if self.trunk is not None and name in self.trunk.parts:
            return self.trunk.read(name)
        return super().read(name)

    def pick_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Read or merge some rows of one tensor."""
        if self.trunk is not None and name in self.trunk.parts:
            return self.trunk.pick_rows(name, rows)
        return super().pick_rows(name, rows)


def make_specialists(checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int) -> tuple[Specialist, ...]:
    """Each checkpoint's specialist; the checkpoints are the base and the plan's sources."""
    trunk = Trunk(checkpoints, plan, seed)
    pieces = (piece for write in plan.writes for piece in write.pieces)
    experts = {piece.matrix.source for piece in pieces if isinstance(piece, ExpertPart)}
    base, names = checkpoints[0], {dtype: name for name, dtype in DTYPES.items()}
    merged = {name: replace(base.entries[name], dtype=names[dtype]) for name, dtype in trunk.dtypes.items()}
    return tuple(
        Specialist(
            base.directory,
            base.config,
            {**base.entries, **merged, **{name: own.entries[name] for name in experts}},
            base.untied,
            trunk,
            dict.fromkeys(experts, own),
        )
        for own in checkpoints
    )
