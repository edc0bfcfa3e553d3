"""What a long quantization has done so far, on the disk, so that a killed one is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from export.quantization import Quantized

_FACTS = "facts"
_FLOAT = ".float"


@dataclass(frozen=True)
class KeptLayer:
    """A quantized layer: its weights by name, float tensors that stand in the place of the checkpoint's, and facts for JSON."""

    quantized: Mapping[str, Quantized]
    floats: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class LayerJournal:
    """Layers as they were quantized by one plan, a file each that is there whole or not at all; without a folder nothing is kept."""

    def __init__(self, scratch: Path | None, plan: Mapping[str, int], settings: str = "") -> None:
        digest = hashlib.sha256(json.dumps([sorted(plan.items()), settings]).encode()).hexdigest()
        self._folder = None if scratch is None else scratch / f"layers-{digest[:12]}"

    def read(self, layer: int) -> KeptLayer | None:
        """A layer that was kept; None where it is not done."""
        file = self._file(layer)
        if file is None or not file.exists():
            return None
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()[_FACTS])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (it is no mapping)
        names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
        found = {name: Quantized(tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors.get(f"{name}.zero_points")) for name in names}
        floats = {key.removesuffix(_FLOAT): tensor for key, tensor in tensors.items() if key.endswith(_FLOAT)}
        return KeptLayer(found, floats, facts)

    def write(self, layer: int, kept: KeptLayer) -> None:
        """Keep a layer."""
        file = self._file(layer)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = {f"{name}.{part}": tensor for name, q in kept.quantized.items() for part, tensor in q.parts().items()}
        parts |= {f"{name}{_FLOAT}": tensor for name, tensor in kept.floats.items()}
        fresh = file.with_suffix(".partial")
        save_file({key: part.contiguous() for key, part in parts.items()}, fresh, {_FACTS: json.dumps(kept.facts)})
        os.replace(fresh, file)

    def _file(self, layer: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{layer:05d}.safetensors"


class LineJournal:
    """Records of measurements, a line of JSON for those that were made together; the file is whole whenever the process is killed."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> Iterator[dict[str, Any]]:
        """All records."""
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                yield from json.loads(line)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records."""
        old = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        fresh = self._file.with_suffix(".partial")
        fresh.write_text(f"{old}{json.dumps(records)}\n", encoding="utf-8")
        os.replace(fresh, self._file)
