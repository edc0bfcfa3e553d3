"""Hugging Face checkpoints on disk, read tensor by tensor or by rows.

The safetensors layout is read here from its own header (8 bytes of little-endian length, a JSON object, then the data),
because two things are asked of it that the library does not promise: memory that does not grow with the model (no
mapped pages), and one clear line for every way in which a file can be wrong. Format: huggingface/safetensors, README
"Format".
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from dense2moe.upcycle.checkpoints.companions import find_companions, is_training_state
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME, complete_tokenizer
from dense2moe.upcycle.checkpoints.pointers import POINTER_REMEDY, is_pointer
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = {
    **DTYPES,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
STEM = "model"
INDEX_NAME = f"{STEM}.safetensors.index.json"
SINGLE_NAME = f"{STEM}.safetensors"
GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"

# The name of an embedding in the models that we read, and the others that share its matrix where it is tied.
_TIED_DECODER = ("model.embed_tokens.weight", ("lm_head.weight",))
_TIED_SEQ2SEQ = ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"))
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DISTRIBUTED = (
    "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"  # as transformers 5.23 names them, distributed/checkpoint.py
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_READ_AGAIN = "mend its mode or its disk, or download it again"
_CHUNK_BYTES = 1 << 24
_MOST_LETTERS = 500  # of a tensor's name, in which a path of modules fits many times
_MAX_LAYERS = 100_000  # a hundred times the deepest model there is
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, safetensors dtype name, shape, and byte range in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Values, of whatever size."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory: its loaded config and where every tensor lies. Holds no tensor.

    `untied` names stored copies of a tied embedding whose values differ from it. transformers 5 ties equal weights
    alone and loads these as they are; so the config of such a decoder says here that its embeddings are not tied,
    whatever the file says.
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

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, with the dtype it is stored in."""
        return read_tensor(self.entries[name])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some rows of one tensor into fresh memory, with the dtype it is stored in."""
        return read_rows(self.entries[name], start, stop)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into fresh memory, with the dtype it is stored in; no page of the file stays mapped."""
    return _read(entry, entry.start, entry.shape)


def read_rows(entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Read rows `start` to `stop` of one tensor (elements, where it has one dimension) into fresh memory.

    With the dtype it is stored in.
    """
    row_bytes = entry.num_bytes // max(1, entry.shape[0])
    return _read(entry, entry.start + start * row_bytes, (stop - start, *entry.shape[1:]))


def read_chunks(entry: TensorEntry, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """Read rows `start` to `stop` (all) of one tensor in pieces of about 4 million elements.

    Memory does not grow with the tensor.
    """
    if entry.num_elements == 0 or not entry.shape:
        yield read_tensor(entry)
        return
    stop = entry.shape[0] if stop is None else stop
    step = max(1, CHUNK_ELEMENTS * entry.shape[0] // entry.num_elements)
    for first in range(start, stop, step):
        yield read_rows(entry, first, min(stop, first + step))


def _read(entry: TensorEntry, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    buffer = bytearray(math.prod(shape) * READABLE[entry.dtype].itemsize)
    with one_line_errors(entry.file, "cannot be read", _READ_AGAIN), entry.file.open("rb", buffering=0) as file:
        file.seek(position)
        view = memoryview(buffer)
        while view:
            count = file.readinto(view[:_CHUNK_BYTES])
            if not count:
                raise UpcycleError(
                    f"{entry.file}: ended inside tensor '{entry.name}'; the file changed while it was read; run again"
                )
            view = view[count:]
    if not buffer:
        return torch.empty(shape, dtype=READABLE[entry.dtype])
    return torch.frombuffer(buffer, dtype=READABLE[entry.dtype]).reshape(shape)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint directory as plain transformers understands it.

    And check everything that can be checked without reading the weights. Only where config.json ties the embeddings and
    a copy of them is stored nevertheless, the copies are read and compared.

    Raises:
        UpcycleError: the directory, its config, its index or a header is missing, truncated, inconsistent, hostile or
            of an unsupported kind; or transformers would take other weights from the directory than those in its
            safetensors files, such as an adapter's.
    """
    if not directory.exists():
        raise UpcycleError(
            f"{directory}: no such directory; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
        )
    if not directory.is_dir():
        raise UpcycleError(
            f"{directory}: is a file; it must be a checkpoint directory with config.json and *.safetensors"
        )
    refuse_adapter(directory)
    for name in find_companions(directory):
        refuse_pointer(directory / name)
    config = read_config(directory)
    entries = index_tensors(directory)
    _refuse_other_weights(directory, config, entries)
    entries = _name_tied(config, entries)
    untied = tuple(_find_untied(config, entries))
    if untied and not config.is_encoder_decoder:
        config.tie_word_embeddings = False
    return Checkpoint(directory, config, entries, untied)


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter, which transformers applies to the model whenever it loads the directory.

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


def refuse_pointer(file: Path) -> None:
    """Refuse a pointer that git-LFS leaves in the place of a file.

    Raises:
        UpcycleError: it is one, or cannot be read at all.
    """
    with one_line_errors(file, "cannot be read", _READ_AGAIN):
        found = is_pointer(file)
    if found:
        raise UpcycleError(f"{file}: is a git-LFS pointer, not the file itself; {POINTER_REMEDY}, or download the file")


def _refuse_other_weights(directory: Path, config: PreTrainedConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse weights that transformers prefers to those in `entries`, which are what is read here."""
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
    """The stored copies of a tied embedding whose values, in float32, are not all equal to it.

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
    """The entries, a tied embedding under its own name where the file has it under another, such as the head's.

    Transformers loads either.
    """
    name, others = _TIED_SEQ2SEQ if config.is_encoder_decoder else _TIED_DECODER
    stored = next((other for other in others if other in entries), None)
    if not getattr(config, "tie_word_embeddings", False) or name in entries or stored is None:
        return entries
    return {
        **{key: entry for key, entry in entries.items() if key != stored},
        name: replace(entries[stored], name=name),
    }


def index_tensors(directory: Path, stem: str = STEM) -> dict[str, TensorEntry]:
    """Where every tensor lies in `stem`.safetensors or in the shards that `stem`.safetensors.index.json lists.

    Raises:
        UpcycleError: the index or a header is missing, truncated, inconsistent, hostile or of an unsupported kind.
    """
    entries: dict[str, TensorEntry] = {}
    for file, expected in _weight_files(directory, stem).items():
        for entry in read_header(file):
            if entry.name in entries:
                raise UpcycleError(
                    f"{file}: tensor '{entry.name}' is also in {entries[entry.name].file.name}; each must be stored "
                    "once"
                )
            if expected is not None and entry.name not in expected:
                raise UpcycleError(
                    f"{file}: tensor '{entry.name}' is not listed for this file in the index; mend the index"
                )
            entries[entry.name] = entry
        if expected is not None and (missing := sorted(expected - entries.keys())):
            raise UpcycleError(
                f"{file}: tensor '{shorten(missing[0])}' must be here by the index but is not; download this file again"
            )
    return entries


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of a checkpoint, as transformers reads it.

    Raises:
        UpcycleError: it is missing or damaged, asks for code, says that the weights are quantized, or transformers
            refuses it.
    """
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
    if raw.get("auto_map") and not _is_known(raw):
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
    """Whether transformers itself has the config and every class that a config file names.

    So that its `auto_map` is not needed: Phi-3's is such.
    """
    names = raw.get("architectures")
    return (
        raw["model_type"] in CONFIG_MAPPING
        and isinstance(names, list)
        and len(names) > 0
        and all(isinstance(name, str) and hasattr(transformers, name) for name in names)
    )


def _weight_files(directory: Path, stem: str) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the names that the index gives it (None without an index)."""
    if (directory / f"{stem}.safetensors.index.json").is_file():
        files = {directory / name: expected for name, expected in read_index(directory, stem).items()}
        for file in files:
            if not file.is_file():
                raise UpcycleError(
                    f"{directory / f'{stem}.safetensors.index.json'}: names {file.name}, which is not there; "
                    "download it"
                )
        return dict(files)
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return {single: None}
    pickles = (path for pattern in _PICKLES for path in sorted(directory.glob(pattern)))
    if (pickle := next((path for path in pickles if not is_training_state(path.name)), None)) is not None:
        raise UpcycleError(
            f"{pickle}: pickled weights can run code and are never loaded; convert them to {SINGLE_NAME} first"
        )
    raise UpcycleError(
        f"{directory}: no {single.name} and no {single.name}.index.json; the weights must be in safetensors"
    )


def read_index(directory: Path, stem: str = STEM) -> dict[str, set[str]]:
    """The names of the files of weights that the index of a checkpoint lists, each with its tensors.

    Raises:
        UpcycleError: there is no index, or it is damaged or names a file elsewhere.
    """
    path = directory / f"{stem}.safetensors.index.json"
    refuse_pointer(path)
    with one_line_errors(
        path, "not a safetensors index", "it must hold a 'weight_map' object of name to file; download it again"
    ):
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    files: dict[str, set[str]] = {}
    for name, file_name in pairs:
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors") or not file_name.isprintable():
            raise UpcycleError(
                f"{path}: '{shorten(name)}' is said to be in '{shorten(file_name)}'; it must be a *.safetensors file "
                "beside the index"
            )
        files.setdefault(file_name, set()).add(name)
    return files


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name '{next(n for n in names if names.count(n) > 1)}' occurs twice")
    return result


def read_header(file: Path) -> list[TensorEntry]:
    """Read and check the header of one safetensors file, without reading its data.

    Raises:
        UpcycleError: truncated, oversized or malformed header; overlapping, missing or leftover bytes; duplicate names;
            unsupported dtype.
    """
    refuse_pointer(file)
    with one_line_errors(file, "cannot be read", _READ_AGAIN), file.open("rb") as stream:
        size, prefix = os.fstat(stream.fileno()).st_size, stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2:
            raise UpcycleError(f"{file}: not a safetensors file ({size} bytes, no header); download it again")
        if length > _MAX_HEADER_BYTES or 8 + length > size:
            raise UpcycleError(
                f"{file}: header says {length} bytes in a file of {size}; truncated or not safetensors; download it "
                "again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no object of texts")
        spans = [_span(name, value) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpcycleError(f"{file}: malformed safetensors header ({shorten(error)}); download it again") from error
    position = 0
    entries = []
    for name, dtype, shape, begin, end in sorted(spans, key=lambda s: (s[3], s[4])):
        if begin != position:
            kind = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise UpcycleError(
                f"{file}: tensor '{name}' {kind} at byte {begin} (expected {position}); the file is corrupt; "
                "download it again"
            )
        if dtype not in READABLE:
            raise UpcycleError(
                f"{file}: tensor '{name}' has dtype {shorten(dtype)}; it must be one of {', '.join(DTYPES)}"
            )
        needed = math.prod(shape) * READABLE[dtype].itemsize
        if end - begin != needed:
            raise UpcycleError(
                f"{file}: tensor '{name}' of shape {list(shape)} {dtype} has {end - begin} bytes; it must have {needed}"
            )
        position = end
        entries.append(TensorEntry(name, file, dtype, shape, 8 + length + begin, needed))
    if 8 + length + position != size:
        raise UpcycleError(
            f"{file}: {size} bytes; by its header it must have {8 + length + position}; truncated or corrupt; "
            "download it again"
        )
    return entries


def _span(name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not name.isprintable() or len(name) > _MOST_LETTERS:
        raise ValueError(
            f"tensor '{shorten(name)[:60]}' must have a name of printable characters, {_MOST_LETTERS} at most"
        )
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"tensor '{name}' has no dtype and shape")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"tensor '{name}' has {number!r} where a count must be")
    return name, dtype, tuple(shape), begin, end


def check_values(checkpoint: Checkpoint, dropped: Collection[str] = ()) -> Iterator[str]:
    """Read every tensor once and refuse NaN and infinite values; yields each name when it is done, for progress.

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
        count = sum(int((~torch.isfinite(chunk)).sum()) for chunk in read_chunks(entry))
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
