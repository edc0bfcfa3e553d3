"""A tensor of a safetensors file: read whole, by rows, in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dense2moe.upcycle.errors import UpcycleError, one_line_errors

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
READ_AGAIN = "mend its mode or its disk, or download it again"
CHUNK_ELEMENTS = 1 << 22
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies, and what it is.

    Its file, safetensors dtype name, shape, and byte range in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Number of rows; a single number is one."""
        return self.shape[0] if self.shape else 1


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into fresh memory, in its stored dtype.

    No page of the file stays mapped.
    """
    return _read(entry, entry.start, entry.shape)


def read_rows(entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Read rows `start` to `stop` into fresh memory, in their stored dtype.

    Of a tensor of one dimension, rows are elements.
    """
    row_bytes = entry.num_bytes // max(1, entry.shape[0])
    return _read(entry, entry.start + start * row_bytes, (stop - start, *entry.shape[1:]))


def read_chunks(entry: TensorEntry, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """Read rows of one tensor in pieces of about 4 million elements.

    Rows `start` to `stop` are read, by default all.

    Memory does not grow with the tensor.
    """
    if entry.num_elements == 0 or not entry.shape:
        yield read_tensor(entry)
        return
    yield from (read_rows(entry, *rows) for rows in chunk_rows(entry, start, stop))


def chunk_rows(entry: TensorEntry, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """The first row of each chunk, and the one after its last.

    Of rows `start` to `stop` (all) of a tensor, about 4 million elements a chunk.
    """
    stop = entry.shape[0] if stop is None else stop
    step = max(1, CHUNK_ELEMENTS * entry.shape[0] // entry.num_elements)
    yield from ((first, min(stop, first + step)) for first in range(start, stop, step))


def _read(entry: TensorEntry, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    buffer = bytearray(math.prod(shape) * READABLE[entry.dtype].itemsize)
    with one_line_errors(entry.file, "cannot be read", READ_AGAIN), entry.file.open("rb", buffering=0) as file:
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
