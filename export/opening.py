"""Opening ONNX packages; a defect in a file is one line.

A package may come from anybody: cut by a download, made of git-LFS pointers, written for another runtime, or no package
at all. What onnx, onnxruntime, json, tokenizers and the file system say of its files becomes an `ExportError` that
names the file. A package is opened in this order:

1. `model.onnx`, or `onnx/model.onnx`, is read without its weights.
2. The files of weights are looked up, and every tensor must lie within its file. Links are followed, but only to files
   below the package, or below the directory in which `model.onnx` itself lies. So the hub's cache opens, whose
   snapshots are links into `blobs`, and no package makes weights of other files of its user's. onnxruntime has the same
   rule for a path; of a graph in memory it wants weights below one directory, without links out of it, and onnx reads
   no links at all. So a graph names here the files behind the links.
3. `config.json`, or what `genai_config.json` says in its place, must hold the sizes that are asked for.
4. A session starts, and runs. onnxruntime knows operators and shapes better than we do, and says what is wrong with a
   graph.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime as ort

from dense2moe.export.errors import ExportError
from dense2moe.export.names import is_past
from dense2moe.export.storage import DECODER_NAME, ENCODER_NAME, GENAI_CONFIG_NAME, MODEL_NAME, find_graph
from dense2moe.upcycle.checkpoints import tokenizer
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.pointers import POINTER_REMEDY, is_pointer
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

_AGAIN = "download the package again, or export it again"
_PACKED_BITS = {
    getattr(onnx.TensorProto, name): int(name[-1])
    for name in ("INT4", "UINT4", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
}
"""Types of which several lie in a byte."""
_GENAI_SIZES = {
    "max_position_embeddings": "model.context_length",
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.decoder.hidden_size",
    "num_attention_heads": "model.decoder.num_attention_heads",
    "num_key_value_heads": "model.decoder.num_key_value_heads",
    "head_dim": "model.decoder.head_size",
}
"""Fields of a config, and where onnxruntime-genai's description has them."""
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+/onnxruntime/\S+:\d+ (?:[^()]*\([^()]*\) )?")
"""What onnxruntime puts before a message: its code, and the place and signature of the function that threw it."""


@dataclass(frozen=True)
class OpenedPackage:
    """A package that was opened.

    Its graph without weights, whose tensors name their files relative to `data_folder`, links followed.
    """

    directory: Path
    name: str
    model: onnx.ModelProto
    data_folder: Path

    @property
    def path(self) -> Path:
        """The file of the graph."""
        return find_graph(self.directory, self.name)

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes keys and values of tokens before."""
        return any(is_past(value.name) for value in self.model.graph.input)

    def read_tensor(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """The values of a tensor of the graph; bfloat16 as in onnx.

        Raises:
            ExportError: its file does not hold them.
        """
        with one_line_errors(self.path, f"the tensor {shorten(tensor.name)!r} cannot be read", _AGAIN, ExportError):
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                return onnx.numpy_helper.to_array(tensor)
            location, offset, length = _find_span(tensor)
            own = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            with (self.data_folder / location).open("rb") as file:
                file.seek(offset)
                own.raw_data = file.read(-1 if length is None else length)
            return onnx.numpy_helper.to_array(own)

    def start_session(self, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
        """A session of the graph in its present state.

        Its weights are mapped from their files.

        Raises:
            ExportError: onnxruntime refuses it.
        """
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.data_folder))
        options.log_severity_level = 4  # what an error logs, it says too
        with onnxruntime_errors(self.path, "load"):
            return ort.InferenceSession(self.model.SerializeToString(), options, providers=[provider])


def is_pair(directory: Path) -> bool:
    """Whether a package has graphs of an encoder and a decoder."""
    return find_graph(directory, DECODER_NAME).is_file() and not find_graph(directory).is_file()


def open_package(directory: Path, name: str = MODEL_NAME) -> OpenedPackage:
    """Read a package's graph, and look up the files of its weights.

    `name` is the graph's file, where the package has several.

    Raises:
        ExportError: no package is there, a file is missing, cut or a pointer of git-LFS, or weights lie elsewhere.
    """
    path = find_graph(directory, name)
    with one_line_errors(path, "cannot be read", "give the directory of an ONNX package", ExportError):
        if name == MODEL_NAME and is_pair(directory):
            raise ExportError(
                f"{directory}: has {ENCODER_NAME} and {DECODER_NAME}, an encoder and a decoder; this reads one graph, "
                f"{MODEL_NAME}"
            )
        if not path.is_file():
            what = f"no {name}" if directory.is_dir() else "is a file" if directory.exists() else "no such directory"
            raise ExportError(f"{directory}: {what}; it must be an ONNX package, as `dense2moe run` writes it")
        _refuse_pointer(path)
    with one_line_errors(path, "is no ONNX model", _AGAIN, ExportError):
        model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise ExportError(
            f"{path}: is {'empty' if not path.stat().st_size else 'no ONNX model: it has no nodes'}; {_AGAIN}"
        )
    _check_branches(model, path)
    outside = [tensor for tensor in _walk_tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    files = {
        location: _find_file(directory, path, location)
        for location in dict.fromkeys(_locate(tensor, path) for tensor in outside)
    }
    folder = Path(os.path.commonpath([file.parent for file in files.values()])) if files else directory.resolve()
    sizes = {location: file.stat().st_size for location, file in files.items()}
    for tensor in outside:
        location, offset, length = _find_span(tensor)
        _check_size(tensor, length, path)
        if (end := offset + (length or 0)) > sizes[location]:
            raise ExportError(
                f"{path.parent / location}: has {sizes[location]:,} bytes; the tensor {shorten(tensor.name)!r} in "
                f"{name} ends at {end:,}, "
                f"so the file is truncated, or belongs to another model; {_AGAIN}"
            )
        next(entry for entry in tensor.external_data if entry.key == "location").value = (
            files[location].relative_to(folder).as_posix()
        )
    return OpenedPackage(directory, name, model, folder)


def open_graphs(directory: Path) -> tuple[OpenedPackage, ...]:
    """Open all graphs of a package.

    One, or an encoder's and a decoder's.

    Raises:
        ExportError: as `open_package`.
    """
    files = (ENCODER_NAME, DECODER_NAME) if is_pair(directory) else (MODEL_NAME,)
    return tuple(open_package(directory, name) for name in files)


def _check_size(tensor: onnx.TensorProto, length: int | None, path: Path) -> None:
    """Refuse a tensor whose shape contradicts its file's size.

    Onnxruntime would allocate what the shape says first.
    """
    name = shorten(tensor.name)
    with one_line_errors(path, f"the tensor {name!r} has a type that onnx does not know", _AGAIN, ExportError):
        bits = _PACKED_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    needed = math.ceil(math.prod(tensor.dims) * bits / 8)
    if min(tensor.dims, default=0) < 0 or (length is not None and needed != length):
        raise ExportError(
            f"{path}: the tensor {name!r} of shape {list(tensor.dims)} takes {needed:,} bytes; {length or 0:,} are "
            f"said to be there; {_AGAIN}"
        )


@contextmanager
def onnxruntime_errors(path: Path, verb: str) -> Iterator[None]:
    """Context manager: an error of onnxruntime becomes one line.

    Only calls of onnxruntime about one package belong inside.

    Raises:
        ExportError: it cannot `verb` the graph in `path`.
    """
    mend = "upgrade onnxruntime if it lacks something, or export the package again"
    with one_line_errors(path, f"onnxruntime {ort.__version__} cannot {verb} it", mend, ExportError):
        try:
            yield
        except Exception as error:
            if (text := _CODE.sub("", str(error))) == str(error):
                raise
            raise type(error)(_CODE.sub("", text)) from error


def _refuse_pointer(file: Path) -> None:
    if is_pointer(file):
        raise ExportError(f"{file}: is a git-LFS pointer, not the file itself; {POINTER_REMEDY}")


def _check_branches(model: onnx.ModelProto, path: Path) -> None:
    """Refuse an `If` whose two branches do not return its outputs."""
    for node in model.graph.node:
        bodies = [attribute.g for attribute in node.attribute if attribute.name in ("then_branch", "else_branch")]
        if node.op_type == "If" and not (
            len(bodies) == 2 and all(len(body.output) == len(node.output) for body in bodies)
        ):
            raise ExportError(
                f"{path}: the node {shorten(node.name)!r} lacks a branch, or what a branch must return; {_AGAIN}"
            )


def _walk_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants of a graph, and of the branches in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _walk_tensors(inner)


def _locate(tensor: onnx.TensorProto, path: Path) -> str:
    """The file that a tensor names; the entry must be well formed."""
    with one_line_errors(
        path, f"the tensor {shorten(tensor.name)!r} does not say where its weights lie", _AGAIN, ExportError
    ):
        location, offset, length = _find_span(tensor)
        if offset < 0 or (length or 0) < 0:
            raise ValueError(f"offset {offset}, length {length}")
    return location


def _find_span(tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
    """File, offset and length of an external tensor.

    Without a length the tensor ends with the file.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"]) if "length" in entries else None


def _find_file(directory: Path, path: Path, location: str) -> Path:
    """The file of weights of a graph that links lead to.

    Raises:
        ExportError: there is none, it is a pointer of git-LFS, or not one of the package.
    """
    shown = shorten(location)
    with one_line_errors(path.parent / shown, "cannot be read", _AGAIN, ExportError):
        file = (path.parent / location).resolve()
        inside = not Path(location).is_absolute() and ".." not in Path(location).parts
        if not inside or not any(file.is_relative_to(home) for home in (directory.resolve(), path.resolve().parent)):
            raise ExportError(
                f"{path}: its weights lie in {shown!r}, outside the package; must be a file beside "
                f"{path.name}; {_AGAIN}"
            )
        if not file.is_file():
            raise ExportError(f"{path.parent / shown}: no such file; {path.name} has its weights there; {_AGAIN}")
        _refuse_pointer(file)
    return file


@dataclass(frozen=True)
class Config:
    """A package's sizes and the file that gives them.

    Fields that are null are left out.
    """

    path: Path
    values: Mapping[str, Any]
    places: Mapping[str, str]

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A field that must be a whole number, at least `least`.

        Raises:
            ExportError: it is missing without a `default`, or something else.
        """
        value = self.values.get(name, default)
        if type(value) is int and value >= least:
            return value
        place = self.places.get(name, name)
        what = f"{place} is {shorten(json.dumps(value))}" if name in self.values else f"{place} is missing"
        must = f"must be a whole number from {least} on"
        raise ExportError(
            f"{self.path}: {what}; {must}; copy the file from the checkpoint that the package was made from"
        )


def read_config(directory: Path) -> Config:
    """The model's config, with a nested language model's fields on top.

    Or what onnxruntime-genai's description says of it.

    Raises:
        ExportError: neither is there, or it is no JSON object.
    """
    path = directory / CONFIG_NAME
    if path.is_file() or path.is_symlink():
        values = _read_object(path)
        inner = values.get("text_config")
        return Config(path, _without_null({**inner, **values} if isinstance(inner, dict) else values), {})
    path = directory / GENAI_CONFIG_NAME
    if not path.is_file():
        raise ExportError(
            f"{directory}: no {CONFIG_NAME}; copy it there from the checkpoint that the package was made from"
        )
    described = _read_object(path)
    return Config(
        path, _without_null({name: _dig(described, place) for name, place in _GENAI_SIZES.items()}), _GENAI_SIZES
    )


def _read_object(path: Path) -> dict[str, Any]:
    with one_line_errors(path, "is no JSON", "copy it from the checkpoint that the package was made from", ExportError):
        _refuse_pointer(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ExportError(f"{path}: is no JSON object; copy it from the checkpoint that the package was made from")
    return values


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _dig(values: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def load_tokenizer(directory: Path) -> Any:
    """A package's tokenizer.

    Raises:
        ExportError: transformers cannot load one.
    """
    try:
        return tokenizer.load_tokenizer(directory)
    except UpcycleError as error:
        raise ExportError(str(error)) from error
