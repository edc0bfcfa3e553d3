"""Specialists: dense models of the merged weights and one source's FFNs.

A text that only one source's experts serve is read so by the mixture: what is no expert is merged, and each FFN is that
source's. Nothing of it is written; a layer's tensors are made when they are asked for.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from dense2moe.upcycle.building.merger import Merger
from dense2moe.upcycle.building.pieces import Merged, Site
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.models.parts import Part, layer_of

FFN: tuple[Part, ...] = ("ffn_gate", "ffn_up", "ffn_down")
OUTSIDE = -1
"""The number of no layer: of the embedding, the final norm and the head."""


class Specialists:
    """Every source's specialist, as the tensors that differ from the base's.

    `checkpoints` are the base and the plan's sources, and `owner` numbers them. A shared expert counts for nothing
    here: the FFN is the source's whole.
    """

    def __init__(self, checkpoints: tuple[Checkpoint, ...], plan: UpcyclePlan, seed: int) -> None:
        self._checkpoints, self._plan = checkpoints, plan
        self._merger = Merger(checkpoints, plan, seed)
        self._merge_once = lru_cache(maxsize=1)(self._merge)  # all specialists ask for a layer, one after the other

    def read(self, owner: int, layer: int) -> dict[str, torch.Tensor]:
        """A layer's tensors, float32, by their dense names.

        Those outside of layers for `OUTSIDE`.
        """
        found = dict(self._merge_once(layer))
        if Site(0, layer) in self._plan.sites:
            names = {self._plan.conversion.family.find(part, layer) for part in FFN} - {None}
            found |= {name: self._checkpoints[owner].read(name).to(torch.float32) for name in names if name is not None}
        return found

    def _merge(self, layer: int) -> dict[str, torch.Tensor]:
        """The merged tensors of a layer, before any arithmetic is folded in."""
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for write in self._plan.writes:
            for piece in write.pieces:
                if isinstance(piece, Merged) and layer_of(piece.rows.source) == layer:
                    merged = torch.cat([chunk.clone() for chunk in self._merger.merge(piece.rows)])
                    parts.setdefault(piece.rows.source, {})[piece.rows.start] = merged
        return {name: torch.cat([part for _, part in sorted(found.items())]) for name, found in parts.items()}
