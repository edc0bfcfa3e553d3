"""The blend: a dense model of merged weights and averaged FFNs.

The FFNs are those that become experts. Routers of merged sources are read by the blend. Its states are near the
mixture's own, where several experts serve a token, and it is one model for all domains. Were each domain's text read by
its own source's FFNs, a regression could tell sources apart by what they leave in the states, and not texts
(docs/results/domains.md). Nothing of it is written; a tensor is made when it is read.
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


@dataclass(frozen=True)
class Blend(Checkpoint):
    """The base, but for tensors that are merged or averaged.

    `parts` are the slices of merged tensors, in order; `experts` the checkpoints whose tensor is averaged, by its name.
    """

    merger: Merger | None = None
    parts: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    experts: Mapping[str, tuple[Checkpoint, ...]] = field(default_factory=dict)

    def is_stored(self, name: str) -> bool:
        """Whether the tensor lies in a file as it is."""
        return name not in self.parts and name not in self.experts

    def read(self, name: str) -> torch.Tensor:
        """Read or make one tensor."""
        if self.is_stored(name):
            return super().read(name)
        entry, start = self.entries[name], 0
        made = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for chunk in self._make(name):
            made[start : start + len(chunk)] = chunk
            start += len(chunk)
        return made

    def pick_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Read or make some rows of one tensor, in their order.

        All are made, chunk by chunk, and the others dropped: thresholds and what is drawn are of whole tensors.
        """
        if self.is_stored(name):
            return super().pick_rows(name, rows)
        found, places, start = [], [], 0
        for chunk in self._make(name):
            here = torch.nonzero((rows >= start) & (rows < start + len(chunk))).flatten()
            found.append(chunk[rows[here] - start].to(DTYPES[self.entries[name].dtype]))
            places.append(here)
            start += len(chunk)
        return torch.cat(found)[torch.cat(places).argsort()]

    def _make(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows, float32, some at a time."""
        if name in self.experts:
            first, *others = (own.read_chunks(name) for own in self.experts[name])
            for chunk in first:
                mean = chunk.to(torch.float32)
                for other in others:
                    mean += next(other)
                yield mean.div_(len(self.experts[name]))
            return
        assert self.merger is not None
        for part in self.parts[name]:
            yield from self.merger.merge(part)


def make_blend(checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int) -> Blend:
    """The blend of the base and the plan's sources, `checkpoints`."""
    base, dtypes = checkpoints[0], {dtype: name for name, dtype in DTYPES.items()}
    entries, parts, averaged = dict(base.entries), dict[str, tuple[Slice, ...]](), set[str]()
    for write in plan.writes:
        for piece in write.pieces:
            match piece:
                case Merged(rows=rows):
                    slices = (*parts.get(rows.source, ()), rows)
                    parts[rows.source] = tuple(sorted(slices, key=lambda each: each.start))
                    entries[rows.source] = replace(base.entries[rows.source], dtype=dtypes[write.spec.dtype])
                case ExpertPart(matrix=rows):
                    averaged.add(rows.source)
    own = tuple(checkpoints[number] for number in sorted(set(plan.owners)))
    experts = dict.fromkeys(sorted(averaged), own)
    return Blend(base.directory, base.config, entries, base.untied, Merger(checkpoints, plan, seed), parts, experts)
