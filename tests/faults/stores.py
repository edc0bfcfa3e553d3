"""Weights of a file as rows, however they lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, numpy_helper

Array = np.ndarray[Any, Any]
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class Inexpressible(Exception):
    """A graph that a fault cannot be planted in, and why."""


class Store:
    """Weights of a file as rows [R, K] of a matrix that is multiplied from the left, or of a table."""

    is_table: bool

    @cached_property
    def values(self) -> Array:
        """What the rows stand for, float32 [R, K]."""
        raise NotImplementedError

    def read(self, rows: Array) -> tuple[Array, ...]:
        """All that the file holds of these rows, part by part; the first dimension of each is the rows."""
        raise NotImplementedError

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        """Put such parts into rows."""
        raise NotImplementedError

    def scale(self, rows: Array, factor: float, columns: slice) -> None:
        """Multiply rows, or the groups of them that the columns begin in."""
        raise NotImplementedError


class Floats(Store):
    """A float tensor [rows, K] or [E, rows, K]; with `turned`, [K, rows] or [E, K, rows]."""

    def __init__(self, tensor: TensorProto, turned: bool, is_table: bool) -> None:
        self.tensor, self.turned, self.is_table = tensor, turned, is_table
        self.array = read_tensor(tensor)

    def _rows(self) -> Array:
        array = np.swapaxes(self.array, -1, -2) if self.turned else self.array
        return array.reshape(-1, array.shape[-1])

    @cached_property
    def values(self) -> Array:
        return self._rows().astype(np.float32)

    def read(self, rows: Array) -> tuple[Array, ...]:
        return (self._rows()[rows],)

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        found = self._rows().copy()
        found[rows] = parts[0]
        shape = np.swapaxes(self.array, -1, -2).shape if self.turned else self.array.shape
        self.array = found.reshape(shape)
        self.array = np.ascontiguousarray(np.swapaxes(self.array, -1, -2)) if self.turned else self.array
        write_tensor(self.tensor, self.array)

    def scale(self, rows: Array, factor: float, columns: slice) -> None:
        (found,) = self.read(rows)
        wide = found.astype(np.float32)
        wide[:, columns] *= np.float32(factor)
        self.write(rows, (wide.astype(found.dtype),))


class Integers(Store):
    """Codes and scales, and maybe zero points: each tensor with rows first once its leading dimensions are joined."""

    def __init__(
        self,
        codes: TensorProto,
        scales: TensorProto,
        zero_points: TensorProto | None,
        bits: int,
        width: int,
        num_rows: int,
        is_table: bool,
    ) -> None:
        self.tensors = [tensor for tensor in (codes, scales, zero_points) if tensor is not None]
        self.bits, self.width, self.num_rows, self.is_table = bits, width, num_rows, is_table

    def _part(self, number: int) -> Array:
        return read_tensor(self.tensors[number]).reshape(self.num_rows, -1)

    @cached_property
    def values(self) -> Array:
        codes = unpack(self._part(0), self.bits)
        scales = self._part(1).astype(np.float32)
        blocks = scales.shape[1]
        zero: Array = np.full((self.num_rows, blocks), 1 << (self.bits - 1), np.float32)
        if len(self.tensors) > 2:
            zero = (
                self._part(2).astype(np.float32)
                if self.tensors[2].data_type in FLOATS
                else unpack(self._part(2), self.bits)[:, :blocks]
            )
        values = (codes.reshape(self.num_rows, blocks, -1).astype(np.float32) - zero[..., None]) * scales[..., None]
        return values.reshape(self.num_rows, -1)[:, : self.width]

    def read(self, rows: Array) -> tuple[Array, ...]:
        return tuple(self._part(number)[rows] for number in range(len(self.tensors)))

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        for number, (tensor, part) in enumerate(zip(self.tensors, parts, strict=True)):
            found = self._part(number).copy()
            found[rows] = part
            write_tensor(tensor, found.reshape(read_tensor(tensor).shape))

    def scale(self, rows: Array, factor: float, columns: slice) -> None:
        parts = list(self.read(rows))
        blocks = parts[1].shape[1]
        size = -(-self.width // blocks)
        first, last = (columns.start or 0) // size, blocks if columns.stop is None else max(1, columns.stop // size)
        wide = parts[1].astype(np.float32)
        wide[:, first:last] *= np.float32(factor)
        parts[1] = wide.astype(parts[1].dtype)
        self.write(rows, parts)


class Dequantized(Store):
    """Signed integers [K, rows] with one scale for each row, as `DequantizeLinear` reads them."""

    is_table = False

    def __init__(self, codes: TensorProto, scales: TensorProto) -> None:
        self.codes, self.scales = codes, scales

    @cached_property
    def values(self) -> Array:
        return (read_tensor(self.codes).astype(np.float32) * read_tensor(self.scales)).T

    def read(self, rows: Array) -> tuple[Array, ...]:
        return read_tensor(self.codes).T[rows], read_tensor(self.scales)[rows]

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        codes, scales = read_tensor(self.codes).copy(), read_tensor(self.scales).copy()
        codes[:, rows], scales[rows] = parts[0].T, parts[1]
        write_tensor(self.codes, codes)
        write_tensor(self.scales, scales)

    def scale(self, rows: Array, factor: float, columns: slice) -> None:
        codes, scales = self.read(rows)
        self.write(rows, (codes, scales * np.float32(factor)))


class Rows(NamedTuple):
    """A matrix where it lies: rows of a store, in the matrix's order."""

    store: Store
    numbers: Array

    def some(self, rows: slice | list[int]) -> Rows:
        """Some of the rows."""
        return Rows(self.store, self.numbers[rows])

    def scale(self, factor: float, columns: slice = slice(None)) -> None:
        """Multiply them."""
        self.store.scale(self.numbers, factor, columns)

    def exchange(self, other: Rows) -> None:
        """Swap them with as many others."""
        mine, yours = self.store.read(self.numbers), other.store.read(other.numbers)
        if [part.shape for part in mine] != [part.shape for part in yours]:
            raise Inexpressible("the two matrices have other bits")
        self.store.write(self.numbers, yours)
        other.store.write(other.numbers, mine)


def read_tensor(tensor: TensorProto) -> Array:
    found: Array = numpy_helper.to_array(tensor)
    return found


def write_tensor(tensor: TensorProto, value: Array) -> None:
    assert value.dtype == read_tensor(tensor).dtype, (
        f"{tensor.name}: {value.dtype} in the place of {read_tensor(tensor).dtype}"
    )
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def unpack(codes: Array, bits: int) -> Array:
    """Codes [R, n] of a byte each; of two in a byte the first is the low one."""
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)


# The graph.
