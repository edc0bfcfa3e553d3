"""The twin: a float32 checkpoint with dequantized weights, beside its integers.

And how the graph builder reads both. The directory is a plain Hugging Face checkpoint whose weights are the dequantized
ones, so transformers alone can run exactly what the ONNX file will hold. Beside it `scales.safetensors` keeps the
scales and zero points; from these and the weights the integers, which the graph packs, follow to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.blockwise import PARTS, Quantized, dequantize, join, num_blocks, recover
from dense2moe.export.variant import STATIC, ElementType
from dense2moe.upcycle.checkpoints.headers import index_tensors
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import CHUNK_ELEMENTS, TensorEntry, read_rows, read_tensor
from dense2moe.upcycle.errors import one_line_errors, shorten
from dense2moe.upcycle.models.architecture import Architecture

SCHEME_NAME = "quantization.json"
STEM = "scales"
_SCHEME_FIELDS = {
    "variant": str,
    "element_type": str,
    "float_type": str,
    "tensors": dict,
    "input_scales": dict,
    "block_size": int | None,
    "zero_points": bool,
}
_RESTORE = "copy it again from the run that quantized the model"
COLUMN_SCALES = "column_scales"
"""The part of a quantized matrix that holds what its columns were multiplied by.

Where its input is to be divided by it as the graph runs.
"""


@dataclass(frozen=True)
class FloatWeight:
    """A float matrix [rows, width] in the twin.

    All or some rows of a tensor, whose dimensions but the last count as one.
    """

    entry: TensorEntry
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        start, stop = self.rows or (0, math.prod(self.entry.shape[:-1]))
        return stop - start, self.entry.shape[-1]

    def read(self) -> torch.Tensor:
        """The matrix, float32 [rows, width]."""
        flat = replace(self.entry, shape=(math.prod(self.entry.shape[:-1]), self.entry.shape[-1]))
        return read_rows(flat, *(self.rows or (0, flat.shape[0]))).to(torch.float32)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix [rows, width] in the twin.

    Its weights, where its scales are, and the first of its rows in both.

    `is_static`: its rows have one scale each, a block being as wide as they are, and it reads integers times
    `input_scale`.
    """

    entry: TensorEntry
    scales: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    bits: int
    block_size: int
    start: int = 0
    zero_points: bool = False
    is_static: bool = False
    input_scale: float = 1.0

    @property
    def name(self) -> str:
        """The name of its tensor."""
        return self.entry.name

    @property
    def num_blocks(self) -> int:
        """Blocks along the width."""
        return num_blocks(self.shape[1], self.block_size)

    @property
    def content(self) -> str:
        """A key that identifies this matrix."""
        return f"{self.name}[{self.start}:{self.start + self.shape[0]}]"

    def read(self) -> Quantized:
        """Codes, scales and zero points; see `Quantized`.

        Floats are in memory some rows at a time.
        """
        step, stop = max(1, CHUNK_ELEMENTS // self.shape[1]), self.start + self.shape[0]
        columns = self.read_column_scales()
        return join(
            [self._read_rows(start, min(start + step, stop), columns) for start in range(self.start, stop, step)]
        )

    def _read_rows(self, start: int, stop: int, columns: torch.Tensor | None) -> Quantized:
        scales = read_rows(self.scales[f"{self.name}.scales"], start, stop).to(torch.float32)
        zero_points = read_rows(self.scales[f"{self.name}.zero_points"], start, stop) if self.zero_points else None
        weight = FloatWeight(self.entry, (start, stop)).read()
        return recover(weight if columns is None else weight * columns, scales, zero_points, self.bits, self.block_size)

    def read_column_scales(self) -> torch.Tensor | None:
        """Factors of the columns, float32 [width], or None."""
        entry = self.scales.get(f"{self.name}.{COLUMN_SCALES}")
        return None if entry is None else read_tensor(entry)


Weight = FloatWeight | QuantizedWeight


@dataclass(frozen=True)
class Bias:
    """A float vector in the twin: a tensor or some elements.

    Biases of stacked experts lie in one tensor, one after another.
    """

    entry: TensorEntry
    elements: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The name of its tensor, with the elements of a part."""
        return self.entry.name if self.elements is None else f"{self.entry.name}[{self.elements[0]}:{self.elements[1]}]"

    @property
    def size(self) -> int:
        """How many elements it has."""
        start, stop = self.elements or (0, self.entry.num_elements)
        return stop - start

    def read(self) -> torch.Tensor:
        """The vector, float32 [size]."""
        flat = replace(self.entry, shape=(self.entry.num_elements,))
        return read_rows(flat, *(self.elements or (0, self.entry.num_elements))).to(torch.float32)


class Twin:
    """A directory written by `quantize_checkpoint`, opened for the graph builder."""

    def __init__(self, directory: Path) -> None:
        """Open it.

        Raises:
            ExportError, UpcycleError: it is no checkpoint, was never quantized, or its `quantization.json` is damaged.
        """
        self.directory = directory
        self.checkpoint = open_checkpoint(directory)
        self.scheme = _read_scheme(directory / SCHEME_NAME)
        self.element_type: ElementType = self.scheme["element_type"]
        self.float_type: ElementType = self.scheme["float_type"]
        self.scales = index_tensors(directory, STEM) if self.scheme["tensors"] else {}

    @cached_property
    def family(self) -> Architecture:
        """The architecture's record.

        Raises:
            ExportError: it does not know it.
        """
        return find_decoder_family(self.checkpoint.config)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the checkpoint, by name."""
        return self.checkpoint.entries

    def weight(self, name: str, rows: tuple[int, int] | None = None) -> Weight:
        """The matrix `name`, quantized or not, or some rows of it.

        All dimensions but the last count as rows.
        """
        entry, bits = self.checkpoint.entries[name], self.scheme["tensors"].get(name)
        if bits is None:
            return FloatWeight(entry, rows)
        shape = entry.shape
        start, stop = rows or (0, math.prod(shape[:-1]))
        if self.scheme["variant"] != STATIC:
            return QuantizedWeight(
                entry,
                self.scales,
                (stop - start, shape[-1]),
                bits,
                self.scheme["block_size"],
                start,
                self.scheme["zero_points"],
            )
        # an embedding that is only read row by row multiplies nothing
        scales = self.scheme["input_scales"].get(name, [1.0])
        rows_of_one = math.prod(shape[:-1]) // len(scales)
        own = scales[start // rows_of_one]
        return QuantizedWeight(
            entry, self.scales, (stop - start, shape[-1]), bits, shape[-1], start, is_static=True, input_scale=own
        )


def _read_scheme(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ExportError(
            f"{path.parent}: no {path.name}, so it was never quantized; quantize the checkpoint into a new directory, "
            "as variant 'float32' to keep its weights as they are, and give that directory"
        )
    with one_line_errors(path, "is no JSON", _RESTORE, ExportError):
        scheme: Any = json.loads(path.read_text(encoding="utf-8"))
    values = scheme if isinstance(scheme, dict) else {}
    wrong, kind = next(
        ((name, kind) for name, kind in _SCHEME_FIELDS.items() if not isinstance(values.get(name), kind)), (None, None)
    )
    if wrong is not None:
        raise ExportError(
            f"{path}: {wrong} is {shorten(json.dumps(values.get(wrong)))}; must be of type "
            f"{getattr(kind, '__name__', kind)}; {_RESTORE}"
        )
    return values


def read_dequantized(name: str, integers: Mapping[str, TensorEntry], shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """The float32 tensor that integers encode."""
    weight = dequantize(read_quantized(name, integers), shape[-1], bits).reshape(shape)
    entry = integers.get(f"{name}.{COLUMN_SCALES}")
    return weight if entry is None else weight / read_tensor(entry)


def read_quantized(name: str, integers: Mapping[str, TensorEntry]) -> Quantized:
    """The integers of a whole tensor."""
    codes, scales, *zero_points = (
        read_tensor(integers[key]) for part in PARTS if (key := f"{name}.{part}") in integers
    )
    return Quantized(codes, scales.to(torch.float32), *zero_points)
