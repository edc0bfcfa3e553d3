"""Weights written by shard: the plan first, then bytes, never a whole model.

A tensor is given as a run of contents: tensors, or spans of other files, which the kernel copies without any of it passing through this process
(`copy_file_range`; a plain read and write where the file system cannot). So copies cost what `cp` costs, in time and in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from upcycle.checkpoint import READABLE, STEM
from upcycle.errors import UpcycleError

_CHUNK_BYTES = 1 << 24
_DTYPE_NAMES = {dtype: name for name, dtype in READABLE.items()}
# What `copy_file_range` says where it cannot serve: other file systems, old kernels, special files.
_UNSUPPORTED = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """Bytes of a file, as they are."""

    file: Path
    start: int
    num_bytes: int


Content = torch.Tensor | Span


def write_tensors(
    directory: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor | Iterable[Content]]],
    shard_bytes: int,
    stem: str = STEM,
) -> None:
    """Write tensors in the order of `specs` into size-limited shards and, when there are several, an index.

    `tensors` must yield exactly the names of `specs`, in their order: each with the tensor itself, of its dtype and shape, or with contents that
    follow each other and add up to its bytes. One content is held at a time.

    Raises:
        ValueError: `tensors` does not follow `specs` (a mistake of the caller, not of the user).
        UpcycleError: a file that is copied from ended early.
        OSError: the disk is full or not writable.
    """
    shards = _divide(list(specs), shard_bytes)
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    with ExitStack() as stack:
        copier = _Copier(stack)
        for number, shard in enumerate(shards, 1):
            name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            with (directory / name).open("wb", buffering=0) as file:
                _write_all(file, _header(shard))
                for spec in shard:
                    written, content = next(source, ("nothing", torch.empty(0)))
                    if written != spec.name:
                        raise ValueError(f"planned {spec}, was given {written}")
                    _write_tensor(file, spec, content, copier)
                    weight_map[spec.name] = name
    if (extra := next(source, None)) is not None:
        raise ValueError(f"tensor {extra[0]} was not planned")
    if len(shards) > 1:
        total = sum(spec.num_bytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensor(file: IO[bytes], spec: TensorSpec, content: torch.Tensor | Iterable[Content], copier: _Copier) -> None:
    if isinstance(content, torch.Tensor):
        if tuple(content.shape) != spec.shape:
            raise ValueError(f"planned {spec}, was given the shape {tuple(content.shape)}")
        content = (content,)
    written = 0
    for part in content:
        if isinstance(part, Span):
            copier.copy(part, file)
            written += part.num_bytes
        else:
            if part.dtype != spec.dtype:
                raise ValueError(f"planned {spec}, was given {part.dtype}")
            data = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
            _write_all(file, data)
            written += len(data)
    if written != spec.num_bytes:
        raise ValueError(f"planned {spec}, was given {written} bytes and not {spec.num_bytes}")


def _write_all(file: IO[bytes], data: Any) -> None:
    """Write every byte: an unbuffered file may take fewer at a call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:_CHUNK_BYTES]) :]


class _Copier:
    """Copies spans, each file opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, IO[bytes]] = {}
        self._in_kernel = hasattr(os, "copy_file_range")

    def copy(self, span: Span, target: IO[bytes]) -> None:
        """Append a span to `target`."""
        if span.file not in self._files:
            self._files[span.file] = self._stack.enter_context(span.file.open("rb", buffering=0))
        source = self._files[span.file]
        done = 0
        while done < span.num_bytes:
            count = self._step(source, target, span.start + done, span.num_bytes - done)
            if count == 0:
                raise UpcycleError(f"{span.file}: ended while it was copied; the file changed while it was read; run again")
            done += count

    def _step(self, source: IO[bytes], target: IO[bytes], position: int, num_bytes: int) -> int:
        if self._in_kernel:
            try:
                return os.copy_file_range(source.fileno(), target.fileno(), num_bytes, offset_src=position)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._in_kernel = False
        data = os.pread(source.fileno(), min(num_bytes, _CHUNK_BYTES), position)
        _write_all(target, data)
        return len(data)


def read_span(span: Span) -> Iterator[torch.Tensor]:
    """The bytes of a span, uint8, in chunks; one chunk where there are at most 16 MiB.

    Raises:
        UpcycleError: the file ends before the span does.
    """
    with span.file.open("rb", buffering=0) as file:
        for start in range(0, span.num_bytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, span.num_bytes - start)
            data = bytearray(os.pread(file.fileno(), count, span.start + start))
            if len(data) < count:
                raise UpcycleError(f"{span.file}: ended while it was read; the file changed; run again")
            yield torch.frombuffer(data, dtype=torch.uint8)


def _divide(specs: list[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def _header(shard: list[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in shard:
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, position + spec.num_bytes]}
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
