"""How a model's vectors are pooled, by sentence-transformers' files beside it.

`modules.json` names what follows the model: `Pooling`, whose folder says how, and `Normalize`. Where neither is there
the vector is the mean. What is not computed here is refused: its vectors would be others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten
from dense2moe.upcycle.tasks.pooling import POOLS, Pooling

MODULES_NAME, POOLING_FOLDER = "modules.json", "1_Pooling"

_KEYS: Mapping[str, str] = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""The key that older settings switch a mode on by.

Vectors of several stand in this order where keys switch them on, else in the order of their names.
"""

_MODULES = (("Transformer", ""), ("Pooling", POOLING_FOLDER))


def read_pooling(directory: Path) -> Pooling:
    """The pooling of a model's directory.

    Raises:
        UpcycleError: a file is damaged, or asks for something that is not computed here.
    """
    folder, normalizes = POOLING_FOLDER, False
    modules = directory / MODULES_NAME
    for module in _read_json(modules, list) if modules.is_file() else ():
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            folder = str(module.get("path") or folder)
        elif kind not in ("Transformer", "Normalize"):
            raise UpcycleError(
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
    switched = [name for name, key in _KEYS.items() if said.get(key) is True]
    modes = [named] if isinstance(named, str) else switched if named is None else list(named)
    if not modes or not all(mode in POOLS for mode in modes):
        raise UpcycleError(
            f"{settings}: its pooling is {shorten(modes)}; must be one or more of {', '.join(POOLS)}; restore the file"
        )
    return tuple(modes)


def _read_json(file: Path, kind: type) -> Any:
    with one_line_errors(file, "cannot be read", "restore the file"):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, kind):
        raise UpcycleError(f"{file}: holds a {type(found).__name__}; must hold a {kind.__name__}; restore the file")
    return found


def complete_pooling(directory: Path, width: int) -> None:
    """Write how a model's vectors are pooled, unless files say so.

    `width` is that of its hidden states. Then sentence-transformers reads the directory as what it was trained to be.
    """
    if (directory / MODULES_NAME).exists():
        return
    modes = read_pooling(directory).modes
    settings = {"word_embedding_dimension": width, **{key: name in modes for name, key in _KEYS.items()}}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(_MODULES)
    ]
    (directory / POOLING_FOLDER).mkdir(exist_ok=True)
    for file, told in ((directory / POOLING_FOLDER / CONFIG_NAME, settings), (directory / MODULES_NAME, modules)):
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
