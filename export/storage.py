"""A graph on disk: file names, metadata keys, and weights beside it.

A decoder's graph lies beside its configs, where onnxruntime-genai looks. Any other lies in the folder `onnx`, as on the
hub, where sentence-transformers and transformers.js look for it, and so do the graphs of an encoder and a decoder
together; optimum finds both. The weights' file has the name that optimum and transformers.js fetch beside a graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedConfig

from dense2moe.export.names import is_past
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME, save_config
from dense2moe.upcycle.checkpoints.mixture_classes import dense_config, is_own, usual_sizes
from dense2moe.upcycle.progress import Progress

MODEL_NAME = "model.onnx"
DATA_NAME = f"{MODEL_NAME}_data"
ENCODER_NAME, DECODER_NAME = "encoder_model.onnx", "decoder_model_merged.onnx"
"""The two graphs of an encoder-decoder, as optimum and transformers.js name them."""
FOLDER_NAME = "onnx"  # of all graphs but a decoder's by itself
GENAI_CONFIG_NAME = "genai_config.json"  # onnxruntime-genai's description of a package
MIN_ONNXRUNTIME_KEY = "dense2moe.min_onnxruntime"
LOWERING_KEY = "dense2moe.lowering"
CONTENT = "content"
"""What an initializer holds, in its `meta`: those that hold the same bytes lie in the file once."""

_JS_CONFIG = {"dtype": "fp32", "use_external_data_format": True}
"""That the graph is `model.onnx`, whatever its weights are, and has a file of weights beside it."""
_LEAST_BYTES = 256  # what is smaller lies in the graph's own file
_PAGE_BYTES, _LEAST_ALIGNED_BYTES = 4096, 1 << 20  # large weights begin at a page, so that they can be mapped


def find_graph(package: Path, name: str = MODEL_NAME) -> Path:
    """The file of a package's graph, or its usual place."""
    usual, inner = package / name, package / FOLDER_NAME / name
    return inner if inner.is_file() and not usual.is_file() else usual


def data_name(name: str) -> str:
    """The file of weights beside a graph's own."""
    return f"{name}_data"


def has_cache(model: ir.Model) -> bool:
    """Whether a graph takes keys and values of tokens before."""
    return any(value.name and is_past(value.name) for value in model.graph.inputs)


def save_graph(model: ir.Model, package: Path, progress: Progress, name: str = MODEL_NAME) -> int:
    """Write graph and weights into a package; returns their bytes.

    One initializer is in memory at a time.

    The model then reads its weights from the file.
    """
    directory = package if name == MODEL_NAME and has_cache(model) else package / FOLDER_NAME
    directory.mkdir(exist_ok=True)
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    with (directory / data_name(name)).open("wb") as file:
        for number, _ in enumerate(_write_weights(values, file, directory, data_name(name)), 1):
            progress("writing weights", number, len(values))
    ir.save(model, directory / name)
    return sum((directory / written).stat().st_size for written in (name, data_name(name)))


def save_package_config(config: PreTrainedConfig, output: Path, decodes: bool = True) -> None:
    """Write `config.json`, under the names that clients know.

    `decodes`: the graph is a decoder's. Any other can be loaded by transformers.js, which is told its files' names.
    """
    save_config(dense_config(config), output)
    others = usual_sizes(config) if is_own(config.model_type) else {}
    own = {} if decodes else {"transformers.js_config": _JS_CONFIG}
    if others or own:
        path = output / CONFIG_NAME
        values = others | json.loads(path.read_text(encoding="utf-8")) | own
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(values: list[ir.Value], file: BinaryIO, directory: Path, data: str) -> Iterator[None]:
    """Move large initializers into the file, and let them refer to it."""
    written: dict[tuple[object, ir.DataType, int], int] = {}
    for value in values:
        tensor = value.const_value
        assert tensor is not None, f"initializer {value.name} has no value"
        size, content = tensor.nbytes, value.meta.get(CONTENT)
        if size >= _LEAST_BYTES:
            offset = written.get((content, tensor.dtype, size)) if content is not None else None
            if offset is None:
                offset = file.tell()
                if size >= _LEAST_ALIGNED_BYTES:
                    file.write(bytes(-offset % _PAGE_BYTES))
                    offset = file.tell()
                is_plain = tensor.dtype != ir.DataType.BFLOAT16
                file.write(np.ascontiguousarray(tensor.numpy()).data.cast("B") if is_plain else tensor.tobytes())
                written[content, tensor.dtype, size] = offset
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                data, offset, size, tensor.dtype, shape=shape, name=value.name or "", base_dir=directory
            )
        yield
