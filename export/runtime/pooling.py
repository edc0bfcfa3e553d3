"""Hidden states of a text as one vector.

As sentence-transformers' settings beside the model say. `modules.json` names what follows the model: `Pooling`, whose
folder says how, and `Normalize`. Where neither is there the vector is the mean. What is not computed here is refused:
its vectors would be others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dense2moe.export.errors import ExportError
from dense2moe.upcycle.errors import one_line_errors, shorten

MODULES_NAME, POOLING_FOLDER, CONFIG_NAME = "modules.json", "1_Pooling", "config.json"


def _mean_by_place(hidden: torch.Tensor) -> torch.Tensor:
    """The mean, each token weighing as much as its place.

    Places count from 1 (SGPT, Muennighoff 2022, section 4.1).
    """
    places = torch.arange(1, len(hidden) + 1, dtype=hidden.dtype)[:, None]
    return (hidden * places).sum(0) / places.sum()


_POOLS: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "cls": ("pooling_mode_cls_token", lambda hidden: hidden[0]),
    "max": ("pooling_mode_max_tokens", lambda hidden: hidden.amax(0)),
    "mean": ("pooling_mode_mean_tokens", lambda hidden: hidden.mean(0)),
    "mean_sqrt_len_tokens": (
        "pooling_mode_mean_sqrt_len_tokens",
        lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    ),
    "weightedmean": ("pooling_mode_weightedmean_tokens", _mean_by_place),
    "lasttoken": ("pooling_mode_lasttoken", lambda hidden: hidden[-1]),
}
"""By sentence-transformers' name: the key that older settings switch it on by, and the vector [H] of states [S, H].

Vectors of several stand behind each other: in this order where keys switch them on, else in the order of their names.
"""


@dataclass(frozen=True)
class Pooling:
    """What becomes of a text's hidden states [S, H], all real."""

    modes: tuple[str, ...] = ("mean",)
    normalizes: bool = False

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """One vector [modes * H]."""
        vector = torch.cat([_POOLS[mode][1](hidden) for mode in self.modes])
        return vector / vector.norm().clamp(min=1e-12) if self.normalizes else vector


def read_pooling(directory: Path) -> Pooling:
    """The pooling of a model's directory.

    Raises:
        ExportError: a file is damaged, or asks for something that is not computed here.
    """
    folder, normalizes = POOLING_FOLDER, False
    modules = directory / MODULES_NAME
    for module in _read_json(modules, list) if modules.is_file() else ():
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            folder = str(module.get("path") or folder)
        elif kind not in ("Transformer", "Normalize"):
            raise ExportError(
                f"{modules}: has a module of type '{shorten(kind)}'; vectors are made with Transformer, Pooling and "
                "Normalize alone; make these vectors with sentence-transformers, which opens the package by its ONNX "
                "backend"
            )
        normalizes |= kind == "Normalize"
    settings = directory / folder / CONFIG_NAME
    return Pooling(_read_modes(settings) if settings.is_file() else ("mean",), normalizes)


def _read_modes(settings: Path) -> tuple[str, ...]:
    said = _read_json(settings, dict)
    named = said.get("pooling_mode")
    switched = [name for name, (key, _) in _POOLS.items() if said.get(key) is True]
    modes = [named] if isinstance(named, str) else switched if named is None else list(named)
    if not modes or not all(mode in _POOLS for mode in modes):
        raise ExportError(
            f"{settings}: its pooling is {shorten(modes)}; must be one or more of {', '.join(_POOLS)}; restore the file"
        )
    return tuple(modes)


def _read_json(file: Path, kind: type) -> Any:
    with one_line_errors(file, "cannot be read", "restore the file"):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, kind):
        raise ExportError(f"{file}: holds a {type(found).__name__}; must hold a {kind.__name__}; restore the file")
    return found
