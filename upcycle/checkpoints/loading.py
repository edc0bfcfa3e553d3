"""Models of transformers, loaded without their files beside them in memory.

Weights are read from safetensors alone, and code beside a checkpoint is never run. `load_whole` is the one place where
a checkpoint of somebody else becomes a model: what transformers would draw at random, leave out or only warn about, and
whatever it raises, is one line there.

`from_pretrained` maps a checkpoint's files, and every page that it has read stays resident until the last tensor is
loaded; it reads ahead, and stacks experts from single ones. So a model takes twice its weights while it is loaded. Here
safetensors reads each tensor into memory of its own when its turn comes; transformers names, casts, stacks and counts
them as ever.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from dense2moe.upcycle.checkpoints.headers import INDEX_NAME, SINGLE_NAME, index_tensors
from dense2moe.upcycle.checkpoints.layers import leave_out_absent
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import READABLE
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten
from dense2moe.upcycle.memory import give_heap_back, release_memory
from dense2moe.upcycle.models.table import find_host

_READS_BY_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers: whether no tensor is read before its turn
_HARMLESS = "*rotary_emb.inv_freq*"  # old checkpoints store it in each layer; it follows from the config
_MOST_NAMES = 3  # in a message
_FileStates = tuple[tuple[str, int, int, int], ...]
"""Name, size in bytes, time of change in nanoseconds and inode of each file."""


def load_whole(auto_class: Any, directory: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """`auto_class.from_pretrained(directory)` in evaluation mode, whole or not at all.

    Every weight of the model is in the files, and every weight of the files in the model. Where transformers did not
    tie a head to the embedding because their values differ, the model's config says so, and so does what is saved of
    it.

    Raises:
        UpcycleError: the directory is no whole checkpoint in safetensors, is damaged, asks for code of its own, or is
            no model for `auto_class`.
    """
    checkpoint = check_whole(auto_class, directory)
    with _quiet(), _one_line(directory):
        # Sizes that do not match are to be listed, and refused below, instead of a RuntimeError without their names.
        model, info = load_pretrained(auto_class, directory, dtype, ignore_mismatched_sizes=True, **settings)
    refuse_incomplete(info, str(directory), others=_others(checkpoint.config, checkpoint.entries))
    leave_out_absent(model, checkpoint.entries)
    if set(checkpoint.untied) - set(model.all_tied_weights_keys) and not model.config.is_encoder_decoder:
        model.config.tie_word_embeddings = False
    return model.eval()


def check_whole(auto_class: Any, directory: Path) -> Checkpoint:
    """Refuse what `load_whole` would refuse, from names and shapes alone.

    transformers loads tensors without values, so a size that is wrong costs no memory. Of a model of several parts
    (text and image), nothing but its config and headers is checked.

    Raises:
        UpcycleError: as `load_whole`.
    """
    states = _describe_files(directory)  # before they are read
    checkpoint = open_checkpoint(directory)
    _check_config(auto_class, checkpoint)
    _check_tensors(auto_class, directory, states)
    return checkpoint


def _describe_files(directory: Path) -> _FileStates:
    """The states of all JSON and safetensors files of a directory."""
    files = [
        path for path in sorted(directory.glob("*")) if path.suffix in (".json", ".safetensors") and path.is_file()
    ]
    states = [(path.name, path.stat()) for path in files]
    return tuple((name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states)


@lru_cache(maxsize=256)
def _check_tensors(auto_class: Any, directory: Path, states: _FileStates) -> None:  # noqa: ARG001 (the key)
    """Have transformers name and count the tensors of a checkpoint.

    One that passed is known as long as its files are as `states` says: parity loads the same twin again and again.
    """
    config = _read_config(directory)
    model_class = _find_class(auto_class, config)
    if model_class is None:
        return
    tensors = {
        name: torch.empty(entry.shape, dtype=READABLE[entry.dtype], device="meta")
        for name, entry in index_tensors(directory).items()
    }
    with _quiet(), _one_line(directory):
        settings = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, info = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32, **settings)
    refuse_incomplete(info, str(directory), others=_others(config, tensors))


def _others(config: PreTrainedConfig, names: Iterable[str]) -> tuple[str, ...]:
    """Patterns of what a checkpoint of these names may have or lack."""
    host = find_host(config.model_type)
    if host is None:
        return ()
    architecture = config.architectures[0] if config.architectures else host.base
    return (*host.dropped, *host.find_absent(architecture, names))


def refuse_incomplete(
    info: Mapping[str, Any], where: str, rename: Callable[[str], str] = str, others: tuple[str, ...] = ()
) -> None:
    """Refuse what transformers only warns about in its loading info.

    `rename` gives a tensor of the model the name that it has in the files. `others` are patterns of tensors that may be
    left over or missing.

    Raises:
        UpcycleError: a tensor is missing, left over or of another shape, and what transformers would have done.
    """
    missing, unexpected = (
        sorted(
            {rename(key) for key in info[kind] if not any(fnmatch(key, pattern) for pattern in (*others, _HARMLESS))}
        )
        for kind in ("missing_keys", "unexpected_keys")
    )
    if missing:
        raise UpcycleError(
            f"{where}: {_list_tensors(missing)} missing, which transformers would initialize at random; restore the "
            "file that held it"
        )
    if unexpected:
        raise UpcycleError(
            f"{where}: {_list_tensors(unexpected)} unused, which transformers would ignore; remove it, or "
            f"correct {CONFIG_NAME}"
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UpcycleError(
            f"{where}: {_list_tensors([rename(name)])} of shape {list(found)}; by {CONFIG_NAME} it must be "
            f"{list(expected)}; correct one of the two"
        )
    for message in info["error_msgs"]:
        raise UpcycleError(f"{where}: loading by transformers reports: {shorten(message)}")


def _list_tensors(names: list[str]) -> str:
    """One name or several in a line of text."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(map(repr, names[:_MOST_NAMES])) + more


def _check_config(auto_class: Any, checkpoint: Checkpoint) -> None:
    """Refuse configs without a model class, or with too many layers.

    Too many: more layers than there are tensors.

    The auto class itself would list all configs that it knows.
    """
    config, path = checkpoint.config, checkpoint.directory / CONFIG_NAME
    if not _loads(auto_class, config):
        raise UpcycleError(
            f"{path}: model_type is {config.model_type}, which transformers' {auto_class.__name__} does not load; "
            "give a checkpoint of the right kind"
        )
    num_layers, num_tensors = getattr(config, "num_hidden_layers", 0), len(checkpoint.entries)
    if isinstance(num_layers, int) and num_layers > num_tensors:
        raise UpcycleError(
            f"{path}: num_hidden_layers is {num_layers}; the files hold {num_tensors} tensors, too few; correct it"
        )


def _loads(auto_class: Any, config: Any) -> bool:
    """Whether an auto class, or a model class, takes a config."""
    known = getattr(auto_class, "_model_mapping", None)
    return isinstance(config, auto_class.config_class) if known is None else type(config) in known


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: no warning about a shared expert of width 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        yield


def _one_line(directory: Path) -> AbstractContextManager[None]:
    """Context manager: library errors become one line about the checkpoint.

    Errors of transformers, safetensors or torch.
    """
    return one_line_errors(directory, "transformers cannot load this checkpoint", "download it again, or correct it")


def load_pretrained(
    auto_class: Any,
    directory: Path,
    dtype: torch.dtype,
    config: PreTrainedConfig | None = None,
    reads: Callable[[str], bool] = lambda _: True,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """`auto_class.from_pretrained(directory)` with its loading info.

    With the directory's config, or another that is given; of all tensors those that `reads` wants.

    The weights are all in memory of their own, but for models of several parts (text and image), which are loaded as
    transformers does it. Nothing is checked; see `load_whole`.

    Raises:
        OSError, ValueError: what transformers raises where it cannot load a checkpoint.
    """
    # models of transformers hold themselves; one that nobody names any more would lie beside the new one
    release_memory()
    settings |= {"dtype": dtype, "output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    config = config or _read_config(directory)
    files, model_class = _find_files(directory), _find_class(auto_class, config)
    if model_class is None or not all(file.is_file() for file in files):
        return auto_class.from_pretrained(directory, config=config, local_files_only=True, **settings)  # type: ignore[no-any-return]
    with ExitStack() as opened, by_turn():
        every = (tensor for file in files for tensor in _open_tensors(file, opened))
        tensors = {tensor.name: tensor for tensor in every if reads(tensor.name)}
        model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.name_or_path = model.config.name_or_path = str(directory)
    if model.can_generate():
        model.generation_config = _read_generation_config(directory)
    give_heap_back()  # experts were stacked: single ones are free again
    return model, info


def _read_config(directory: Path) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)  # type: ignore[no-any-return]


def _find_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_NAME).is_file() or not (directory / INDEX_NAME).is_file():
        return [directory / SINGLE_NAME]
    return [
        directory / name
        for name in sorted(set(json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
    ]


def _find_class(auto_class: Any, config: Any) -> Any:
    """The model class that an auto class takes for a config.

    By the config's architecture where there are several.

    None where only itself can tell.
    """
    if not hasattr(auto_class, "_model_mapping"):
        return auto_class
    if not _loads(auto_class, config) or getattr(config, "sub_configs", None):
        return None
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = {each.__name__: each for each in found}
    return next((named[name] for name in getattr(config, "architectures", None) or () if name in named), found[0])


def _read_generation_config(directory: Path) -> GenerationConfig:
    """A checkpoint's generation settings, as `from_pretrained` finds them.

    Its own file, or the fields of its config.
    """
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            directory, config_file_name=CONFIG_NAME, _from_model_config=True, local_files_only=True
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is read when it is indexed.

    Memory that stacking earlier tensors left in the heap is given back first.
    """

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
def by_turn() -> Iterator[None]:
    """Context manager: transformers reads each tensor in its turn."""
    before = os.environ.get(_READS_BY_TURN)
    os.environ[_READS_BY_TURN] = "1"
    try:
        yield
    finally:
        os.environ.pop(_READS_BY_TURN, None)
        if before is not None:
            os.environ[_READS_BY_TURN] = before
