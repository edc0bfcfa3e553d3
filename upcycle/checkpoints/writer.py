"""Weights written by shard: plan first, then bytes, never a whole model.

A tensor is given as a run of contents: tensors, or spans of other files, which the kernel copies without any of it
passing through this process (`copy_file_range`; a plain read and write where the file system cannot). The plan knows
every offset, so spans are copied by threads, each shard's by one: a file system takes one writer to a file at a time,
and several to several files. They are copied last of all: what threads and their queue allocate while tensors are made
lies between those tensors, and keeps the C library from using their memory again (915 MB became 527).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dense2moe.upcycle.checkpoints.headers import STEM
from dense2moe.upcycle.checkpoints.tensors import READABLE
from dense2moe.upcycle.errors import UpcycleError

_CHUNK_BYTES = 1 << 24
_MAX_LANES = 4  # the kernel copies a gigabyte or two a second in each; more would keep no disk busier
_DTYPE_NAMES = {dtype: name for name, dtype in READABLE.items()}
# What `copy_file_range` and `posix_fallocate` say where they cannot serve: other file systems, old kernels, special
# files.
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


@dataclass(frozen=True)
class _Copies:
    """One tensor's spans, their file, and where each begins in it."""

    file: Path
    spans: list[tuple[Span, int]]


def write_tensors(
    directory: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor | Iterable[Content]]],
    shard_bytes: int,
    stem: str = STEM,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write tensors into shards of about one size, in `specs`' order.

    Several shards get an index. `tensors` must yield exactly the names of `specs`, in their order: each with the tensor
    itself, of its dtype and shape, or with contents that follow each other and add up to its bytes. One content is held
    at a time. `report` is called with how many tensors are written, and of how many.

    Raises:
        ValueError: `tensors` does not follow `specs` (a mistake of the caller, not of the user).
        UpcycleError: a file that is copied from ended early.
        OSError: the disk is full or not writable.
    """
    shards = _divide(list(specs), shard_bytes)
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    copies: list[_Copies] = []
    done, total = 0, sum(map(len, shards))
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb", buffering=0) as file:
            header = _header(shard)
            _reserve(file, len(header) + sum(spec.num_bytes for spec in shard))
            _write_all(file, header)
            position = len(header)
            for spec in shard:
                written, content = next(source, ("nothing", torch.empty(0)))
                if written != spec.name:
                    raise ValueError(f"planned {spec}, was given {written}")
                spans = _write_tensor(file, position, spec, content)
                position += spec.num_bytes
                weight_map[spec.name] = name
                if spans:
                    copies.append(_Copies(directory / name, spans))
                else:
                    done += 1
                    report(done, total)
    if (extra := next(source, None)) is not None:
        raise ValueError(f"tensor {extra[0]} was not planned")
    for copied in _Copier().copy(copies):
        report(done + copied, total)
    if len(shards) > 1:
        total_bytes = sum(spec.num_bytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensor(
    file: IO[bytes], position: int, spec: TensorSpec, content: torch.Tensor | Iterable[Content]
) -> list[tuple[Span, int]]:
    """Write the tensors of one content; returns spans and their places."""
    if isinstance(content, torch.Tensor):
        if tuple(content.shape) != spec.shape:
            raise ValueError(f"planned {spec}, was given the shape {tuple(content.shape)}")
        content = (content,)
    copies: list[tuple[Span, int]] = []
    written = 0
    for part in content:
        if isinstance(part, Span):
            if part.num_bytes:
                copies.append((part, position + written))
            written += part.num_bytes
        else:
            if part.dtype != spec.dtype:
                raise ValueError(f"planned {spec}, was given {part.dtype}")
            data = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.seek(position + written)
            _write_all(file, data)
            written += len(data)
    if written != spec.num_bytes:
        raise ValueError(f"planned {spec}, was given {written} bytes and not {spec.num_bytes}")
    return copies


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Reserve the file's space on the disk, where the system can.

    A full disk is told before the work, and ext4 takes a sixth less time.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _write_all(file: IO[bytes], data: Any) -> None:
    """Write every byte; an unbuffered file may take fewer per call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:_CHUNK_BYTES]) :]


class _Copier:
    """Copies spans into shards, in lanes.

    A shard always has the same one, so that what belongs into one file is copied in order.
    """

    def __init__(self) -> None:
        self._in_kernel = hasattr(os, "copy_file_range")

    def copy(self, tensors: list[_Copies]) -> Iterator[int]:
        """Copy these tensors' spans; yields the number copied so far.

        Raises what the first copy that failed raised.
        """
        files = list(dict.fromkeys(tensor.file for tensor in tensors))
        pools = [ThreadPoolExecutor(1) for _ in files[:_MAX_LANES]]
        try:
            lanes = {file: pools[number % len(pools)] for number, file in enumerate(files)}
            futures = [lanes[tensor.file].submit(self._copy_all, tensor) for tensor in tensors]
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                yield number
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def _copy_all(self, tensor: _Copies) -> None:
        with tensor.file.open("r+b", buffering=0) as file:
            for span, place in tensor.spans:
                file.seek(place)
                self._copy(span, file)

    def _copy(self, span: Span, target: IO[bytes]) -> None:
        with span.file.open("rb", buffering=0) as source:
            done = 0
            while done < span.num_bytes:
                count = self._step(source, target, span.start + done, span.num_bytes - done)
                if count == 0:
                    raise UpcycleError(
                        f"{span.file}: ended while it was copied; the file changed while it was read; run again"
                    )
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
    """A span's bytes, uint8, in chunks of at most 16 MiB.

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
    """Tensors in the fewest shards, of sizes as even as possible.

    Threads that share the work end together.
    """
    shards = _fill(specs, shard_bytes)
    too_small, enough = 0, shard_bytes
    while enough - too_small > 1:
        limit = (too_small + enough) // 2
        if len(even := _fill(specs, limit)) > len(shards):
            too_small = limit
        else:
            shards, enough = even, limit
    return shards


def _fill(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Shards filled one after the other, in order."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.num_bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def _header(shard: list[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in shard:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.num_bytes],
        }
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
