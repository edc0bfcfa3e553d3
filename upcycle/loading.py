"""Models of transformers, loaded without their files beside them in memory.

`from_pretrained` maps a checkpoint's files, and every page that it has read stays resident until the last tensor is loaded; it reads ahead, and
stacks experts from single ones. So a model takes twice its weights while it is loaded. Here safetensors reads each tensor into memory of its own when
its turn comes; transformers names, casts, stacks and counts them as ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig
from transformers.utils import CONFIG_NAME

from upcycle.checkpoint import INDEX_NAME, SINGLE_NAME
from upcycle.memory import give_heap_back, release_memory

_READS_BY_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers: whether no tensor is read before its turn


def load_pretrained(auto_class: Any, directory: Path, dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """`auto_class.from_pretrained(directory)` with its loading info.

    The weights of a checkpoint in safetensors are all in memory of their own; any other is loaded as transformers does it.

    Raises:
        OSError, ValueError: what transformers raises where it cannot load a checkpoint.
    """
    release_memory()  # models of transformers hold themselves; one that nobody names any more would lie beside the new one
    settings |= {"dtype": dtype, "output_loading_info": True}
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    files, model_class = _find_files(directory), _find_class(auto_class, config)
    if model_class is None or not all(file.is_file() for file in files):
        return auto_class.from_pretrained(directory, local_files_only=True, **settings)  # type: ignore[no-any-return]
    with ExitStack() as opened, _by_turn():
        tensors = {tensor.name: tensor for file in files for tensor in _open_tensors(file, opened)}
        model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.name_or_path = model.config.name_or_path = str(directory)
    if model.can_generate():
        model.generation_config = _read_generation_config(directory)
    give_heap_back()  # experts were stacked: single ones are free again
    return model, info


def _find_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_NAME).is_file() or not (directory / INDEX_NAME).is_file():
        return [directory / SINGLE_NAME]
    return [directory / name for name in sorted(set(json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))]


def _find_class(auto_class: Any, config: Any) -> Any:
    """The class of models that an auto class takes for a config, by its architecture where there are several; None where only itself can tell."""
    if type(config) not in auto_class._model_mapping or getattr(config, "sub_configs", None):
        return None
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = {each.__name__: each for each in found}
    return next((named[name] for name in getattr(config, "architectures", None) or () if name in named), found[0])


def _read_generation_config(directory: Path) -> GenerationConfig:
    """That of a checkpoint, or what its config says of generation, as `from_pretrained` takes them."""
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(directory, config_file_name=CONFIG_NAME, _from_model_config=True, local_files_only=True)


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is read when it is indexed; what stacking those before it left in the heap is given back."""

    file: Any
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        give_heap_back()
        return self.file.get_tensor(self.name)[index].clone()  # type: ignore[no-any-return]  # in memory as torch aligns it, which products want


def _open_tensors(file: Path, opened: ExitStack) -> Iterator[_Tensor]:
    """All tensors of a file, which is closed with `opened`."""
    found: Any = opened.enter_context(safe_open(file, framework="pt", device="cpu", backend="pread"))
    yield from (_Tensor(found, name) for name in found.keys())  # noqa: SIM118 (the file is no mapping)


@contextmanager
def _by_turn() -> Iterator[None]:
    """For the length of a `with`: transformers reads no tensor before its turn."""
    before = os.environ.get(_READS_BY_TURN)
    os.environ[_READS_BY_TURN] = "1"
    try:
        yield
    finally:
        os.environ.pop(_READS_BY_TURN, None)
        if before is not None:
            os.environ[_READS_BY_TURN] = before
