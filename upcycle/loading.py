"""Models of transformers, loaded without their files beside them in memory.

`from_pretrained` maps a checkpoint's files, and every page that it has read stays resident until the last tensor is loaded; it reads ahead, and
stacks experts from single ones. So a model takes twice its weights while it is loaded. Here safetensors reads each tensor into memory of its own when
its turn comes; transformers names, casts, stacks and counts them as ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from upcycle.checkpoint import GENERATION_CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from upcycle.memory import give_heap_back, release_memory

_READS_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers: whether tensors are read by their turn


def load_pretrained(auto_class: Any, directory: Path, dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """`auto_class.from_pretrained(directory)` with its loading info, for a checkpoint in safetensors; all of the model is in memory of its own.

    Raises:
        OSError, ValueError: what transformers raises where it cannot load a checkpoint.
    """
    release_memory()  # models of transformers hold themselves; one that nobody names any more would lie beside the new one
    files = _find_files(directory)
    if not all(file.is_file() for file in files):  # transformers says what is wrong
        return auto_class.from_pretrained(directory, dtype=dtype, local_files_only=True, output_loading_info=True, **settings)  # type: ignore[no-any-return]
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model_class = _find_class(auto_class, config)
    with _by_turn():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=_open_tensors(files), dtype=dtype, output_loading_info=True, **settings
        )
    if (directory / GENERATION_CONFIG_NAME).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    release_memory()  # experts were stacked: single ones are free again
    return model, info


def _find_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_NAME).is_file() or not (directory / INDEX_NAME).is_file():
        return [directory / SINGLE_NAME]
    return [directory / name for name in sorted(set(json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))]


def _find_class(auto_class: Any, config: Any) -> Any:
    """The class of models that an auto class takes for a config: by its architecture where there are several, else the first."""
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = {each.__name__: each for each in found}
    return next((named[name] for name in getattr(config, "architectures", None) or () if name in named), found[0])


def _open_tensors(files: list[Path]) -> dict[str, Any]:
    """What reads each tensor of some files, by its name."""
    opened: list[Any] = [safe_open(file, framework="pt", device="cpu", backend="pread") for file in files]
    return {name: _Tensor(file, name) for file in opened for name in file.keys()}  # noqa: SIM118 (the file is no mapping)


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is read when it is indexed; what stacking those before it left in the heap is given back."""

    file: Any
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        give_heap_back()
        return self.file.get_tensor(self.name)[index]  # type: ignore[no-any-return]


@contextmanager
def _by_turn() -> Iterator[None]:
    """For the length of a `with`: transformers reads no tensor before its turn."""
    before = os.environ.get(_READS_AHEAD)
    os.environ[_READS_AHEAD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_READS_AHEAD]
        else:
            os.environ[_READS_AHEAD] = before
