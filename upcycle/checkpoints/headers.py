"""Where tensors lie: headers of safetensors files and the index beside them.

The safetensors layout is read here from its own header (8 bytes of little-endian length, a JSON object, then the data),
because two things are asked of it that the library does not promise: memory that does not grow with the model (no
mapped pages), and one clear line for every way in which a file can be wrong. Format: huggingface/safetensors, README
"Format".
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from dense2moe.upcycle.checkpoints.companions import is_training_state
from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.checkpoints.tensors import DTYPES, READ_AGAIN, READABLE, TensorEntry
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

STEM = "model"
INDEX_NAME = f"{STEM}.safetensors.index.json"
SINGLE_NAME = f"{STEM}.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_LETTERS = 500  # of a tensor's name, in which a path of modules fits many times
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def index_tensors(directory: Path, stem: str = STEM) -> dict[str, TensorEntry]:
    """Where every tensor lies, in one safetensors file or in shards.

    The file is `stem`.safetensors; shards are listed by `stem`.safetensors.index.json.

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


def _weight_files(directory: Path, stem: str) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the tensor names the index gives.

    Without an index the names are None.
    """
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
    """The weight files that a checkpoint's index lists, each with its tensors.

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
    """Read and check a safetensors file's header, but no data.

    Raises:
        UpcycleError: truncated, oversized or malformed header; overlapping, missing or leftover bytes; duplicate names;
            unsupported dtype.
    """
    refuse_pointer(file)
    with one_line_errors(file, "cannot be read", READ_AGAIN), file.open("rb") as stream:
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
