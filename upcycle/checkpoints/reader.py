"""Hugging Face checkpoints on disk, checked before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from dense2moe.upcycle.checkpoints.companions import find_companions
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME, complete_tokenizer
from dense2moe.upcycle.checkpoints.headers import INDEX_NAME, SINGLE_NAME, index_tensors
from dense2moe.upcycle.checkpoints.mixture_classes import is_own, register_mixture
from dense2moe.upcycle.checkpoints.module_names import build_empty, name_by_modules
from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.checkpoints.tensors import DTYPES, TensorEntry, read_chunks, read_rows, read_tensor
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten
from dense2moe.upcycle.models.table import DENSE_FAMILIES, find_hosted, find_native, list_stacks

GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"

# The name of an embedding in the models that we read, and the others that share its matrix where it is tied.
_TIED_DECODER = ("model.embed_tokens.weight", ("lm_head.weight",))
_TIED_SEQ2SEQ = ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"))
_DISTRIBUTED = (
    "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"  # as transformers 5.23 names them, distributed/checkpoint.py
)
_MAX_LAYERS = 100_000  # a hundred times the deepest model there is


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory: its config and where tensors lie.

    It holds no tensor. `untied` names stored copies of a tied embedding whose values differ from it. transformers 5
    ties equal weights alone and loads these as they are; so the config of such a decoder says here that its embeddings
    are not tied, whatever the file says.
    """

    directory: Path
    config: PreTrainedConfig
    entries: Mapping[str, TensorEntry]
    untied: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Values of all tensors."""
        return sum(entry.num_elements for entry in self.entries.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def files(self) -> frozenset[Path]:
        """The files that its tensors lie in."""
        return frozenset(entry.file for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, in its stored dtype."""
        return read_tensor(self.entries[name])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows of one tensor into fresh memory, in its stored dtype."""
        return read_rows(self.entries[name], start, stop)

    def pick_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Read some rows of one tensor, by their numbers, in their order."""
        return torch.cat([self.read_rows(name, row, row + 1) for row in rows.tolist()])

    def read_chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Read rows (all) of one tensor, about 4 million elements at once."""
        yield from read_chunks(self.entries[name], start, stop)

    def is_stored(self, name: str) -> bool:
        """Whether the tensor lies in a file as it is."""
        return name in self.entries


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint directory as plain transformers understands it.

    Everything is checked that can be without reading the weights. Only where config.json ties the embeddings and
    a copy of them is stored nevertheless, the copies are read and compared.

    Raises:
        UpcycleError: the directory, its config, its index or a header is missing, truncated, inconsistent, hostile or
            of an unsupported kind; or transformers would take other weights from the directory than those in its
            safetensors files, such as an adapter's.
    """
    _refuse_no_directory(directory)
    refuse_adapter(directory)
    for name in find_companions(directory):
        refuse_pointer(directory / name)
    config = read_config(directory)
    entries = index_tensors(directory)
    _refuse_other_weights(directory, config, entries)
    entries = _name_tied(config, entries)
    hosted = find_hosted(config)
    if hosted is not None and all(stack.count_layers(config) <= len(entries) for stack in list_stacks(hosted)):
        entries = name_by_modules(build_empty(config, hosted, str(directory / CONFIG_NAME)), entries)
    elif hosted is None and (named := _named_by_modules(config)) is not None:
        entries = name_by_modules(build_empty(config, named, str(directory / CONFIG_NAME)), entries)
    untied = tuple(_find_untied(config, entries))
    if untied and not config.is_encoder_decoder:
        config.tie_word_embeddings = False
    return Checkpoint(directory, config, entries, untied)


def _named_by_modules(config: PreTrainedConfig) -> str | None:
    """The class of a native family that names its tensors.

    None where the files have these names: with another head than most have they may lack a prefix or have one more.
    """
    native = find_native(config.model_type, config.architectures)
    if not config.architectures or native is None or native in DENSE_FAMILIES:
        return None
    return str(config.architectures[0])


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter.

    transformers would apply the adapter to the model whenever it loads the directory.

    Raises:
        UpcycleError: the adapter must be merged first, and how.
    """
    path = directory / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return
    what = (
        "an adapter, which transformers applies to the model beside it"
        if (directory / CONFIG_NAME).is_file()
        else "an adapter without its model"
    )
    raise UpcycleError(
        f"{path}: {what}; a checkpoint must be whole: merge it by peft's PeftModel.from_pretrained(model, "
        "adapter).merge_and_unload(), write the "
        "result with save_pretrained() into a new directory, and give that"
    )


def _refuse_other_weights(directory: Path, config: PreTrainedConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse weights that transformers would read instead of `entries`."""
    other = next((entry.file.name for entry in entries.values() if entry.file.name != SINGLE_NAME), None)
    if other is not None and (directory / SINGLE_NAME).is_file():
        raise UpcycleError(
            f"{directory / INDEX_NAME}: names {other}, and transformers loads {SINGLE_NAME} beside it instead; "
            "remove the one that is stale: the "
            f"index with its files, or {SINGLE_NAME}"
        )
    named = getattr(config, "transformers_weights", None)
    if named not in (None, SINGLE_NAME):
        raise UpcycleError(
            f"{directory / CONFIG_NAME}: transformers_weights is {named!r:.80}, which transformers loads in place of "
            f"{SINGLE_NAME}; "
            "load the model and write it with save_pretrained() into a new directory, or remove the field if "
            f"{SINGLE_NAME} is meant"
        )
    if (shard := next(iter(sorted(directory.glob(_DISTRIBUTED))), None)) is not None:
        raise UpcycleError(
            f"{shard}: part of a distributed checkpoint, which transformers loads in place of {SINGLE_NAME}; "
            "load the model and write it with save_pretrained() into a new directory, or remove these files if they "
            "are stale"
        )


def _find_untied(config: PreTrainedConfig, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Stored copies of a tied embedding that differ from it.

    Their float32 values are compared.

    `_tied_params_are_equal` of transformers 5.23.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    name, others = _TIED_SEQ2SEQ if config.is_encoder_decoder else _TIED_DECODER
    yield from (
        other
        for other in others
        if other in entries and name in entries and not _are_equal(entries[name], entries[other])
    )


def _are_equal(first: TensorEntry, second: TensorEntry) -> bool:
    if first.shape != second.shape:
        return False
    pairs = zip(read_chunks(first), read_chunks(second), strict=True)
    return all(torch.equal(one.to(torch.float32), other.to(torch.float32)) for one, other in pairs)


def _name_tied(config: PreTrainedConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries with a tied embedding under its own name.

    The file may give it any of its names.

    transformers loads either.
    """
    name, others = _TIED_SEQ2SEQ if config.is_encoder_decoder else _TIED_DECODER
    stored = next((other for other in others if other in entries), None)
    if not getattr(config, "tie_word_embeddings", False) or name in entries or stored is None:
        return entries
    return {
        **{key: entry for key, entry in entries.items() if key != stored},
        name: replace(entries[stored], name=name),
    }


def _refuse_no_directory(directory: Path) -> None:
    if not directory.exists():
        raise UpcycleError(
            f"{directory}: no such directory; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
        )
    if not directory.is_dir():
        raise UpcycleError(
            f"{directory}: is a file; it must be a checkpoint directory with config.json and *.safetensors"
        )


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of a checkpoint, as transformers reads it.

    Raises:
        UpcycleError: there is no such directory; the config is missing or damaged, asks for code, says that the
            weights are quantized, or transformers refuses it.
    """
    _refuse_no_directory(directory)
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UpcycleError(
            f"{directory}: no config.json; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
        )
    refuse_pointer(path)
    with one_line_errors(path, "not valid JSON", "restore the file"):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UpcycleError(f"{path}: no 'model_type'; it must be the config of a transformers model")
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if isinstance(count := raw.get(name), int) and count > _MAX_LAYERS:  # config classes build lists of this length
            raise UpcycleError(f"{path}: {name} is {count}; it must be at most {_MAX_LAYERS}; the file is corrupt")
    if is_own(raw["model_type"]):
        register_mixture(raw["model_type"])
    elif raw.get("auto_map") and not _is_known(raw):
        raise UpcycleError(
            f"{path}: 'auto_map' asks for code from the checkpoint, which is never run; use a model that "
            "transformers itself knows"
        )
    if raw.get("quantization_config"):
        method = (
            raw["quantization_config"].get("quant_method", "unknown")
            if isinstance(raw["quantization_config"], dict)
            else "unknown"
        )
        raise UpcycleError(
            f"{path}: the weights are quantized ({shorten(method)}); upcycling needs float32, float16 or bfloat16 "
            "weights; give the model as it was "
            "before, or dequantize it and remove 'quantization_config'"
        )
    with one_line_errors(path, "transformers cannot read this config", _mend_config(raw)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return config


def _mend_config(raw: Mapping[str, Any]) -> str:
    rope = raw.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":
        return "rope_scaling.type is 'su', the first name of 'longrope'; write that"
    return "correct the file"


def _is_known(raw: Mapping[str, Any]) -> bool:
    """Whether transformers itself has every class a config names.

    So that its `auto_map` is not needed: Phi-3's is such.
    """
    names = raw.get("architectures")
    return (
        raw["model_type"] in CONFIG_MAPPING
        and isinstance(names, list)
        and len(names) > 0
        and all(isinstance(name, str) and hasattr(transformers, name) for name in names)
    )


def check_values(checkpoint: Checkpoint, dropped: Collection[str] = ()) -> Iterator[str]:
    """Refuse NaN and infinities in every tensor; yields each checked name.

    Tensors that are `dropped` are passed over: nothing is made of their values.

    Raises:
        UpcycleError: a tensor has a dtype that is not supported, or a value that is not finite.
    """
    for name, entry in checkpoint.entries.items():
        if name in dropped:
            yield name
            continue
        if entry.dtype not in DTYPES:
            hint = "; dequantize it first" if entry.dtype.startswith("F8") else ""
            raise UpcycleError(
                f"{entry.file}: tensor '{name}' is stored as {entry.dtype}; it must be one of {', '.join(DTYPES)}{hint}"
            )
        count = sum(int((~torch.isfinite(chunk)).sum()) for chunk in checkpoint.read_chunks(name))
        if count:
            raise UpcycleError(
                f"{entry.file}: tensor '{name}' holds {count} NaN or infinite values; the checkpoint is broken; use "
                "another"
            )
        yield name


def copy_companions(source: Path, output: Path) -> None:
    """Copy what belongs to the model along, see `companions`.

    What of its tokenizer transformers 4 reads otherwise is told it in its own words.
    """
    for name in find_companions(source):
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, output / name)
    complete_tokenizer(output)
