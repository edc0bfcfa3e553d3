"""Progress of a quantization on disk, for resuming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dense2moe.export.quantization.blockwise import Quantized
from dense2moe.upcycle.durable import begin, is_kept, keep, read_facts

_FLOAT = ".float"
_TENSORS_NAME = "layer.safetensors"


@dataclass(frozen=True)
class KeptLayer:
    """A quantized layer.

    Its weights by name, float tensors that stand in the place of the checkpoint's, and facts for JSON.
    """

    quantized: Mapping[str, Quantized]
    floats: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class LayerJournal:
    """Layers as one plan quantized them, a sealed folder each.

    Without a scratch directory nothing is kept.
    """

    def __init__(self, scratch: Path | None, plan: Mapping[str, int], settings: str = "") -> None:
        digest = hashlib.sha256(json.dumps([sorted(plan.items()), settings]).encode()).hexdigest()
        self._folder = None if scratch is None else scratch / f"layers-{digest[:12]}"

    def read(self, layer: int) -> KeptLayer | None:
        """A kept layer; None if not done."""
        folder = self._place(layer)
        if folder is None or not is_kept(folder):
            return None
        tensors = load_file(folder / _TENSORS_NAME)
        names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
        found = {
            name: Quantized(tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors.get(f"{name}.zero_points"))
            for name in names
        }
        floats = {key.removesuffix(_FLOAT): tensor for key, tensor in tensors.items() if key.endswith(_FLOAT)}
        return KeptLayer(found, floats, read_facts(folder))

    def write(self, layer: int, kept: KeptLayer) -> None:
        """Keep a layer."""
        folder = self._place(layer)
        if folder is None:
            return
        parts = {f"{name}.{part}": tensor for name, q in kept.quantized.items() for part, tensor in q.parts().items()}
        parts |= {f"{name}{_FLOAT}": tensor for name, tensor in kept.floats.items()}
        begin(folder)
        save_file({key: part.contiguous() for key, part in parts.items()}, folder / _TENSORS_NAME)
        keep(folder, kept.facts)

    def _place(self, layer: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{layer:05d}"


class RecordJournal:
    """Records of measurements, in numbered sealed folders.

    A folder for those that were made together, from 0.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """All records up to the first missing one.

        New records follow them.
        """
        self._count = 0
        while is_kept(place := self._folder / f"{self._count:05d}"):
            yield from read_facts(place)
            self._count += 1

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records, after all earlier ones have been read."""
        place = self._folder / f"{self._count:05d}"
        begin(place)
        keep(place, records)
        self._count += 1
