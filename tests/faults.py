"""Faults to plant in decoder packages, ours and of other makers: a library of what parity must name.

A fault knows no names of nodes or weights. What it changes is found by what it is: rows of a matrix by their values in
the checkpoint that the package's weights stand for, however they lie in the file (transposed, stacked, packed, as
integers and scales); constants by the pattern of nodes that reads them; caches, masks, positions and logits by the
interface. So one function plants it in any graph and any variant.

    exported = Exported(source, twin, package)
    # `Inexpressible` where that graph cannot have it
    faulty = plant(exported, tmp_path, FAULTS["two experts swapped"], BLOCKS)
    lines = check_parity(faulty.package, faulty.twin, faulty.source, BLOCKS, …).breaches
    named = FAULTS["two experts swapped"].is_named(lines[0])

`plant` also runs both packages on `BLOCKS`, and fails where a fault changes nothing or something else than it should.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.storage import MODEL_NAME
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.architecture import Architecture

Way = Literal["prefill", "padding", "decode", "batch"]
Array = np.ndarray[Any, Any]
Alter = Callable[[str, str], list[onnx.NodeProto]]
"""Nodes from a value's name to the name of what takes its place."""

WAYS: tuple[Way, ...] = ("prefill", "padding", "decode", "batch")
STEPS: tuple[Way, ...] = ("decode", "batch")
LEAST_EFFECT = 1e-5
"""Relative to the largest logit: a package in which a fault is planted differs by more, or the fault is none."""
MOST_SILENCE = 1e-6
"""And in a way of feeding that the fault should not touch by less."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_PAST = "past_key_values."


class Inexpressible(Exception):
    """A graph that a fault cannot be planted in, and why."""


class Exported(NamedTuple):
    """A checkpoint, another with the very weights of the package, which may be the same, and the package."""

    source: Path
    twin: Path
    package: Path


@dataclass(frozen=True)
class Setting:
    """Where faults are planted: a layer, experts, a head of keys, tokens that the text has, and weights to a group."""

    layer: int = 1
    expert: int = 2
    head: int = 0
    tokens: tuple[int, int] = (65, 66)
    group: int = 16


# Weights, however they lie in a file.


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
        self.array = _read(tensor)

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
        _write(self.tensor, self.array)

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
        return _read(self.tensors[number]).reshape(self.num_rows, -1)

    @cached_property
    def values(self) -> Array:
        codes = _unpack(self._part(0), self.bits)
        scales = self._part(1).astype(np.float32)
        blocks = scales.shape[1]
        zero: Array = np.full((self.num_rows, blocks), 1 << (self.bits - 1), np.float32)
        if len(self.tensors) > 2:
            zero = (
                self._part(2).astype(np.float32)
                if self.tensors[2].data_type in _FLOATS
                else _unpack(self._part(2), self.bits)[:, :blocks]
            )
        values = (codes.reshape(self.num_rows, blocks, -1).astype(np.float32) - zero[..., None]) * scales[..., None]
        return values.reshape(self.num_rows, -1)[:, : self.width]

    def read(self, rows: Array) -> tuple[Array, ...]:
        return tuple(self._part(number)[rows] for number in range(len(self.tensors)))

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        for number, (tensor, part) in enumerate(zip(self.tensors, parts, strict=True)):
            found = self._part(number).copy()
            found[rows] = part
            _write(tensor, found.reshape(_read(tensor).shape))

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
        return (_read(self.codes).astype(np.float32) * _read(self.scales)).T

    def read(self, rows: Array) -> tuple[Array, ...]:
        return _read(self.codes).T[rows], _read(self.scales)[rows]

    def write(self, rows: Array, parts: Sequence[Array]) -> None:
        codes, scales = _read(self.codes).copy(), _read(self.scales).copy()
        codes[:, rows], scales[rows] = parts[0].T, parts[1]
        _write(self.codes, codes)
        _write(self.scales, scales)

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


def _read(tensor: TensorProto) -> Array:
    found: Array = numpy_helper.to_array(tensor)
    return found


def _write(tensor: TensorProto, value: Array) -> None:
    assert value.dtype == _read(tensor).dtype, f"{tensor.name}: {value.dtype} in the place of {_read(tensor).dtype}"
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def _unpack(codes: Array, bits: int) -> Array:
    """Codes [R, n] of a byte each; of two in a byte the first is the low one."""
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)


# The graph.


class Graph:
    """A package's graph, weights loaded, and the checkpoint whose weights they are."""

    def __init__(self, proto: onnx.ModelProto, reference: Path, setting: Setting | None = None) -> None:
        self.main, self.at = proto.graph, setting or Setting()
        self.checkpoint = open_checkpoint(reference)
        self.graphs = list(_walk(proto.graph))
        self.tensors = {tensor.name: tensor for graph in self.graphs for tensor in graph.initializer}
        self._separate_tables()

    @property
    def config(self) -> Any:
        return self.checkpoint.config

    @property
    def family(self) -> Architecture:
        return find_decoder_family(self.config)

    # Nodes.

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """All nodes, those of branches too."""
        for graph in self.graphs:
            yield from list(graph.node)

    def maker(self, value: str) -> onnx.NodeProto | None:
        return next((node for node in self.nodes() if value in node.output), None)

    def readers(self, value: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes() if value in node.input]

    def constant(self, value: Array, name: str = "fault.constant") -> str:
        """A new initializer's name."""
        name = f"{name}.{len(self.main.initializer)}"
        self.main.initializer.append(numpy_helper.from_array(value, name))
        self.tensors[name] = self.main.initializer[-1]
        return name

    def resolve(self, value: str) -> TensorProto | None:
        """The constant that a value is, through casts."""
        while value not in self.tensors:
            node = self.maker(value)
            if node is None or node.op_type not in ("Cast", "Identity", "Constant"):
                return None
            if node.op_type == "Constant":
                return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            value = node.input[0]
        return self.tensors[value]

    def alter(self, value: str, build: Alter, shown: bool = False) -> None:
        """Whoever reads `value` reads what the nodes make of it.

        With `shown` its name is that of what they make, as it must be of an output.
        """
        graph = next((graph for graph in self.graphs if any(value in node.output for node in graph.node)), self.main)
        places = [n for n, node in enumerate(graph.node) if value in node.output]
        other = f"fault.{value}"
        if shown:
            made = graph.node[places[0]]
            made.output[:] = [other if name == value else name for name in made.output]
            nodes = build(other, value)
        else:
            for node in self.readers(value):
                node.input[:] = [other if name == value else name for name in node.input]
            nodes = build(value, other)
        for offset, node in enumerate(nodes):
            graph.node.insert((places[0] + 1 if places else 0) + offset, node)

    def elements(self, value: str) -> int:
        """The element type of an input or output of the graph."""
        return next(v.type.tensor_type.elem_type for v in (*self.main.input, *self.main.output) if v.name == value)

    def number(self, value: float | Sequence[float] | Array, like: int) -> str:
        """A constant of an element type."""
        return self.constant(np.asarray(value, helper.tensor_dtype_to_np_dtype(like)))

    def past(self) -> list[str]:
        """The names of all that is cached."""
        return [value.name for value in self.main.input if value.name.startswith(_PAST)]

    def set_attribute(self, node: onnx.NodeProto, name: str, value: float) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    # Weights.

    def _separate_tables(self) -> None:
        """Give tables that are heads too, or shared with them, a tensor of their own."""
        for node in self.nodes():
            tensor = self.tensors.get(node.input[0]) if node.op_type == "Gather" else None
            if tensor is not None and len(tensor.dims) == 2 and len(self.readers(node.input[0])) > 1:
                node.input[0] = self.constant(_read(tensor), "fault.table")

    @cached_property
    def stores(self) -> list[Store]:
        """All weights of the file."""
        found: list[Store] = []
        known: set[str] = set()
        for node in self.nodes():
            match node.op_type:
                case "MatMulNBits":
                    found.append(self._integers(node, 1, 2, 3, "bits", False))
                case "QMoE":
                    found += [
                        self._integers(node, *places, "expert_weight_bits", False)
                        for places in ((2, 3, 11), (5, 6, 12))
                    ]
                case "GatherBlockQuantized" if self._given(node, 0).data_type == TensorProto.UINT8:
                    found.append(self._integers(node, 0, 2, 3, "bits", True))
                case "DequantizeLinear" if (
                    codes := self.resolve(node.input[0])
                ) is not None and codes.data_type == TensorProto.INT8:
                    found += [Dequantized(codes, self._given(node, 1))] if len(codes.dims) == 2 else []
                case _:
                    for place, name in enumerate(node.input):
                        tensor = self.resolve(name)
                        if (
                            tensor is not None
                            and tensor.name not in known
                            and tensor.data_type in _FLOATS
                            and len(tensor.dims) in (2, 3)
                        ):
                            known.add(tensor.name)
                            found += [
                                Floats(tensor, turned, node.op_type == "Gather" and place == 0)
                                for turned in (False, True)
                            ]
        return found

    def _given(self, node: onnx.NodeProto, place: int) -> TensorProto:
        tensor = self.resolve(node.input[place])
        assert tensor is not None, f"{node.op_type} computes its input {place}"
        return tensor

    def _integers(
        self, node: onnx.NodeProto, codes: int, scales: int, zero_points: int, bits_name: str, is_table: bool
    ) -> Integers:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        bits = attributes.get(bits_name, 4)
        packed = self._given(node, codes)
        zeros = self.resolve(node.input[zero_points]) if len(node.input) > zero_points else None
        if node.op_type == "MatMulNBits":
            rows, width = attributes["N"], attributes["K"]
        else:
            rows, width = int(np.prod(packed.dims[:-1])), packed.dims[-1] * 8 // bits
        return Integers(packed, self._given(node, scales), zeros, bits, width, rows, is_table)

    def find(self, matrix: Array, is_table: bool = False) -> list[Rows]:
        """A matrix [N, K] of the checkpoint in the file: once, or once in each branch."""
        found = [
            Rows(store, rows)
            for store in self.stores
            if store.is_table == is_table and (rows := _locate(matrix, store.values)) is not None
        ]
        if not found:
            raise Inexpressible(f"no weights of the file are this matrix of {matrix.shape}")
        return found

    def read(self, name: str | None) -> Array:
        """A tensor of the checkpoint, float32, by its pattern with this setting's layer."""
        name = name and name.format(layer=self.at.layer)
        if name is None or name not in self.checkpoint.entries:
            raise Inexpressible(f"the model has no {name or 'such matrix'}")
        return self.checkpoint.read(name).to(torch.float32).numpy()

    def expert(self, part: Literal["gate", "up", "down"], number: int) -> Array:
        """A matrix [N, K] of one expert of the layer."""
        names = self.family.routed
        if names is None or not self.family.has_experts(self.at.layer, self.checkpoint.entries):
            raise Inexpressible(f"layer {self.at.layer} has no experts")
        if names.gate is not None:
            return self.read(
                {"gate": names.gate, "up": names.up, "down": names.down}[part].replace("{expert}", str(number))
            )
        if part == "down":
            return self.read(names.down)[number]
        both = self.read(names.up)[number]
        return both[: len(both) // 2] if part == "gate" else both[len(both) // 2 :]

    @property
    def num_experts(self) -> int:
        if self.family.experts is None:
            raise Inexpressible("the model has no experts")
        return self.family.gate(self.config).num_experts

    @property
    def head_size(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    def router(self) -> tuple[Floats, onnx.NodeProto]:
        """The router's weights, which are floats, and the product that reads them."""
        for rows in self.find(self.read(self.family.find("router"))):
            if isinstance(rows.store, Floats):
                for node in self.nodes():
                    if node.op_type in ("MatMul", "Gemm") and any(
                        self.resolve(name) is rows.store.tensor for name in node.input
                    ):
                        return rows.store, node
        raise Inexpressible("the router is no product with float weights")


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g)


def _locate(matrix: Array, values: Array) -> Array | None:
    """The rows of `values` [R, K'] that are those of `matrix` [N, K], what is beyond K being zero.

    None where one of them is not there.
    """
    width = matrix.shape[1]
    if values.shape[1] < width or values[:, width:].any() or len(values) < len(matrix):
        return None
    # A squared distance by |a|² - 2 ab + |b|²: 16 bits round a number by 4e-3 of itself at most; another row is as far
    # away as both are long.
    found, size = values[:, :width].astype(np.float64), (matrix.astype(np.float64) ** 2).sum(axis=1)
    distance = size[:, None] - 2 * matrix.astype(np.float64) @ found.T + (found**2).sum(axis=1)
    nearest = distance.argmin(axis=1)
    close = distance[np.arange(len(matrix)), nearest] <= 1e-3 * size
    return nearest if close.all() and len(set(nearest.tolist())) == len(matrix) else None


# The faults.


def swap_two_experts(g: Graph) -> None:
    for part in ("gate", "up", "down"):
        for first, second in zip(g.find(g.expert(part, 0)), g.find(g.expert(part, 1)), strict=True):
            first.exchange(second)


def swap_gate_and_up(g: Graph) -> None:
    for expert in range(g.num_experts):
        for gate, up in zip(g.find(g.expert("gate", expert)), g.find(g.expert("up", expert)), strict=True):
            gate.exchange(up)


def scale_one_expert_by_2_percent(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.scale(1.02)


def scale_one_group(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.some([3]).scale(1.5, slice(0, g.at.group))


def zero_a_row(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.some([5]).scale(0.0)


def leave_weights_unnormalized(g: Graph) -> None:
    """In a fused operator, whose CPU kernel of integers does so whatever it is told, by a factor on what it gives."""
    if g.family.experts is None or not g.family.gate(g.config).renormalize:
        raise Inexpressible("the model does not renormalize")
    changed = False
    for node in g.nodes():
        if node.op_type == "MoE":
            g.set_attribute(node, "normalize_routing_weights", 0)
        elif node.op_type == "QMoE":
            _weigh_by_total(g, node)
        elif node.op_type == "Softmax" and (top := g.maker(node.input[0])) is not None and top.op_type == "TopK":
            _take_all_scores(g, node, top)
        elif (
            node.op_type == "Div"
            and (total := g.maker(node.input[1])) is not None
            and total.op_type == "ReduceSum"
            and total.input[0] == node.input[0]
        ):
            node.input[1] = g.constant(np.ones(1, helper.tensor_dtype_to_np_dtype(g.router()[0].tensor.data_type)))
        else:
            continue
        changed = True
    if not changed:
        raise Inexpressible("no node renormalizes")


def _weigh_by_total(g: Graph, node: onnx.NodeProto) -> None:
    def build(value: str, out: str) -> list[onnx.NodeProto]:
        k = g.constant(np.array([g.config.num_experts_per_tok], np.int64))
        last, zero, one = (g.constant(np.array([number], np.int64)) for number in (-1, 0, 1))
        return [
            helper.make_node("Softmax", [node.input[1]], [f"{out}.all"], axis=-1),
            helper.make_node("TopK", [f"{out}.all", k], [f"{out}.chosen", f"{out}.numbers"], axis=-1),
            helper.make_node("ReduceSum", [f"{out}.chosen", last], [f"{out}.total"], keepdims=1),
            helper.make_node("Shape", [value], [f"{out}.shape"]),
            helper.make_node("Slice", [f"{out}.shape", zero, last], [f"{out}.leading"]),
            helper.make_node("Concat", [f"{out}.leading", one], [f"{out}.column"], axis=0),
            helper.make_node("Reshape", [f"{out}.total", f"{out}.column"], [f"{out}.factor"]),
            helper.make_node("Mul", [value, f"{out}.factor"], [out]),
        ]

    g.alter(node.output[0], build, shown=True)


def _take_all_scores(g: Graph, weights: onnx.NodeProto, top: onnx.NodeProto) -> None:
    name = weights.output[0]
    graph = next(graph for graph in g.graphs if any(name in node.output for node in graph.node))
    place = next(n for n, node in enumerate(graph.node) if name in node.output)
    graph.node.remove(graph.node[place])
    graph.node.insert(place, helper.make_node("Softmax", [top.input[0]], [f"fault.{name}.all"], axis=-1))
    graph.node.insert(
        place + 1, helper.make_node("GatherElements", [f"fault.{name}.all", top.output[1]], [name], axis=1)
    )


def quantize_the_router(g: Graph) -> None:
    store, _ = g.router()
    rows = np.arange(len(store.values))
    scale = np.abs(store.values).max(axis=1, keepdims=True) / 127
    store.write(rows, ((np.round(store.values / scale) * scale).astype(store.array.dtype),))


def _raise_a_router_logit(g: Graph, shown: bool) -> None:
    store, product = g.router()
    change = np.zeros(g.num_experts, np.float32)
    change[g.at.expert] = 0.05
    added = g.number(change, store.tensor.data_type)
    g.alter(product.output[0], lambda value, out: [helper.make_node("Add", [value, added], [out])], shown)


def raise_a_router_logit(g: Graph) -> None:
    _raise_a_router_logit(g, shown=True)


def raise_a_router_logit_behind_its_name(g: Graph) -> None:
    """The value that shows the router's logits is right, and what is routed by is not."""
    _raise_a_router_logit(g, shown=False)


def take_another_rope_theta(g: Graph) -> None:
    half = g.head_size // 2
    exponents = -np.arange(half) / half
    theta = float((g.config.rope_parameters or {}).get("rope_theta", 10000.0))
    right, wrong, found = theta**exponents, (theta / 10) ** exponents, False
    for tensor in g.tensors.values():
        size = int(np.prod(tensor.dims))
        if tensor.data_type not in _FLOATS or size % half or not tensor.dims:
            continue
        value = _read(tensor)
        flat = value.astype(np.float64).reshape(-1, half)
        positions = np.arange(len(flat))[:, None]
        tables = {"frequencies": (right, wrong)} if len(flat) == 1 else {}
        tables |= {
            "cos": (np.cos(positions * right), np.cos(positions * wrong)),
            "sin": (np.sin(positions * right), np.sin(positions * wrong)),
        }
        for true, false in tables.values():
            if np.abs(flat - true).max() < 5e-3 and size > half * (len(flat) == 1 and 0):
                _write(tensor, np.broadcast_to(false, flat.shape).astype(value.dtype).reshape(value.shape))
                found = True
                break
    if not found:
        raise Inexpressible("no rotary table or frequencies stand in the graph")


def drop_the_window(g: Graph) -> None:
    window = getattr(g.config, "sliding_window", None)
    if window is None or window >= g.config.max_position_embeddings:
        raise Inexpressible("the model has no window")
    found = False
    for node in g.nodes():
        if any(attribute.name == "local_window_size" and attribute.i > 0 for attribute in node.attribute):
            g.set_attribute(node, "local_window_size", -1)
            found = True
        for place, name in enumerate(node.input):
            tensor = (
                g.resolve(name)
                if node.op_type in ("Sub", "Add", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
                else None
            )
            if (
                tensor is not None
                and tensor.data_type == TensorProto.INT64
                and abs(int(_read(tensor).flat[0])) == window
                and _read(tensor).size == 1
            ):
                node.input[place] = g.constant(np.sign(_read(tensor)) * np.int64(10**6))
                found = True
    if not found:
        raise Inexpressible("no comparison with the window stands in the graph")


def raise_epsilon(g: Graph) -> None:
    """In every norm."""
    found = False
    for node in g.nodes():
        if any(attribute.name == "epsilon" for attribute in node.attribute):
            g.set_attribute(node, "epsilon", 1e-4)
            found = True
        elif node.op_type == "Add" and any(
            (made := g.maker(name)) is not None and made.op_type == "ReduceMean" for name in node.input
        ):
            place = next(place for place, name in enumerate(node.input) if g.resolve(name) is not None)
            tensor = g.resolve(node.input[place])
            assert tensor is not None
            node.input[place] = g.constant(np.full_like(_read(tensor), 1e-4))
            found = True
    if not found:
        raise Inexpressible("no norm's epsilon stands in the graph")


def _change_a_norm(g: Graph, name: str | None) -> None:
    value = g.read(name)
    found = [
        tensor
        for tensor in g.tensors.values()
        if list(tensor.dims) == list(value.shape) and tensor.data_type in _FLOATS
    ]
    found = [tensor for tensor in found if np.abs(_read(tensor).astype(np.float32) - value).max() < 4e-3]
    if len(found) != 1:
        raise Inexpressible(f"{len(found)} weights of the file are this norm's")
    changed = _read(found[0]).copy()
    changed[7] = changed[7] * np.asarray(1.01, changed.dtype)
    _write(found[0], changed)


def change_an_attention_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.find("attention_norm") or g.family.find("attention_post_norm"))


def change_an_ffn_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.find("ffn_norm") or g.family.find("ffn_post_norm"))


def change_the_final_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.name("final_norm"))


def _no_norm_of(g: Graph, name: str | None) -> None:
    if name is not None and name.format(layer=g.at.layer) in g.checkpoint.entries:
        raise Inexpressible("a norm of what the rows give takes their length away")


def stretch_keys_of_one_head(g: Graph) -> None:
    _no_norm_of(g, g.family.find("key_norm"))
    for rows in g.find(g.read(g.family.name("key"))):
        rows.some(slice(g.at.head * g.head_size, (g.at.head + 1) * g.head_size)).scale(1.01)


def stretch_values_of_one_head(g: Graph) -> None:
    for rows in g.find(g.read(g.family.name("value"))):
        rows.some(slice(g.at.head * g.head_size, (g.at.head + 1) * g.head_size)).scale(1.01)


def change_the_temperature(g: Graph) -> None:
    """Of attention in one layer: the operator's attribute, or queries that are as much longer."""
    present = f"present.{g.at.layer}.key"
    node = g.maker(present)
    if node is not None and node.op_type == "GroupQueryAttention":
        scale = (
            next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 0.0) or g.head_size**-0.5
        )
        g.set_attribute(node, "scale", scale * 1.01)
        return
    _no_norm_of(g, g.family.find("query_norm"))
    for rows in g.find(g.read(g.family.name("query"))):
        rows.scale(1.01)


def swap_embedding_rows(g: Graph) -> None:
    _permute_embedding(g, {0: 1, 1: 0})


def repeat_an_embedding_row(g: Graph) -> None:
    """One wrong row: a token has another one's."""
    _permute_embedding(g, {0: 1})


def _permute_embedding(g: Graph, taken: Mapping[int, int]) -> None:
    """Rows of all that is gathered by token, integers and scales alike.

    Token number n's become those of token number taken[n].
    """
    found = False
    for node in g.readers("input_ids"):
        if node.op_type not in ("Gather", "GatherBlockQuantized"):
            continue
        for name in node.input:
            tensor = g.resolve(name)
            if tensor is not None and tensor.dims and tensor.dims[0] == g.config.vocab_size:
                value = _read(tensor).copy()
                old = value.copy()
                for to, source in taken.items():
                    value[g.at.tokens[to]] = old[g.at.tokens[source]]
                _write(tensor, value)
                found = True
    if not found:
        raise Inexpressible("nothing is gathered by input_ids")


def _head(g: Graph) -> Array:
    return g.read(g.family.name("embedding" if g.config.tie_word_embeddings else "head"))


def scale_a_head_row(g: Graph) -> None:
    for rows in g.find(_head(g)):
        rows.some([g.at.tokens[0]]).scale(1.1)


def swap_head_rows(g: Graph) -> None:
    for rows in g.find(_head(g)):
        rows.some([g.at.tokens[0]]).exchange(rows.some([g.at.tokens[1]]))


def _scale_logits(g: Graph, factor: float) -> None:
    by = g.number(factor, g.elements("logits"))
    g.alter("logits", lambda value, out: [helper.make_node("Mul", [value, by], [out])], shown=True)


def scale_logits_by_a_thousandth(g: Graph) -> None:
    _scale_logits(g, 1.001)


def scale_logits_by_2_percent(g: Graph) -> None:
    _scale_logits(g, 1.02)


# Faults of the interface: masks, positions and the cache.


def shift_the_cache(g: Graph) -> None:
    """What is cached is read one slot late, in every layer: the first key is there twice, and the last one not."""
    axis, step = g.constant(np.array([2], np.int64)), g.constant(np.array([1], np.int64))
    zero, one, last = (g.constant(np.array([number], np.int64)) for number in (0, 1, -1))
    for name in g.past():
        g.alter(
            name,
            lambda value, out: [
                helper.make_node("Slice", [value, zero, one, axis, step], [f"{out}.first"]),
                helper.make_node("Slice", [value, zero, last, axis, step], [f"{out}.rest"]),
                helper.make_node("Concat", [f"{out}.first", f"{out}.rest"], [out], axis=2),
            ],
        )


def shorten_the_cache(g: Graph) -> None:
    """Where something is cached, rows are said to be one token shorter, so a new key takes the last one's place."""
    node = next((node for node in g.nodes() if node.op_type == "GroupQueryAttention"), None)
    if node is None:
        raise Inexpressible("the graph tells no operator how long its rows are")
    steps = _past_is_there(g, "fault.shorter", np.int32)
    lengths = node.input[5]
    g.alter(lengths, lambda value, out: [helper.make_node("Sub", [value, "fault.shorter"], [out])])
    for added in reversed(steps):
        g.main.node.insert(0, added)


def _past_is_there(g: Graph, out: str, dtype: type = np.int64) -> list[onnx.NodeProto]:
    """Nodes that make [1] of 1 where something is cached, and of 0 in a prefill: the mask is longer than the ids."""
    one = g.constant(np.array([1], np.int64))
    return [
        helper.make_node("Shape", ["attention_mask"], [f"{out}.total"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], [f"{out}.new"], start=1, end=2),
        helper.make_node("Sub", [f"{out}.total", f"{out}.new"], [f"{out}.past"]),
        helper.make_node("Min", [f"{out}.past", one], [f"{out}.any"]),
        helper.make_node("Cast", [f"{out}.any"], [out], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
    ]


def stretch_cached_keys_of_one_head(g: Graph) -> None:
    name = f"{_PAST}{g.at.layer}.key"
    factors = np.ones((1, g.config.num_key_value_heads, 1, 1))
    factors[0, g.at.head] = 1.01
    by = g.number(factors, g.elements(name))
    g.alter(name, lambda value, out: [helper.make_node("Mul", [value, by], [out])])


def mix_rows_of_the_cache(g: Graph) -> None:
    """Row 1 of a batch reads row 0's keys and values, in every layer."""
    zero, one = (g.constant(np.array(number, np.int64)) for number in (0, 1))
    squeezed = g.constant(np.array([0], np.int64))
    for name in g.past():
        g.alter(
            name,
            lambda value, out: [
                helper.make_node("Shape", [value], [f"{out}.shape"], start=0, end=1),
                helper.make_node("Squeeze", [f"{out}.shape", squeezed], [f"{out}.batch"]),
                helper.make_node("Range", [zero, f"{out}.batch", one], [f"{out}.rows"]),
                helper.make_node("Equal", [f"{out}.rows", one], [f"{out}.second"]),
                helper.make_node("Where", [f"{out}.second", zero, f"{out}.rows"], [f"{out}.taken"]),
                helper.make_node("Gather", [value, f"{out}.taken"], [out], axis=0),
            ],
        )


def take_the_wrong_pad_side(g: Graph) -> None:
    """The mask is read from its end, as if padding were at the right; its shape is what it was."""
    bounds = [g.constant(np.array([number], np.int64)) for number in (-1, -(10**9), 1, -1)]
    g.alter("attention_mask", lambda value, out: [helper.make_node("Slice", [value, *bounds], [out])])


def read_padding(g: Graph) -> None:
    """Padding is masked nowhere."""
    one = g.constant(np.array([1], np.int64))
    g.alter("attention_mask", lambda value, out: [helper.make_node("Max", [value, one], [out])])


def shift_positions_of_steps(g: Graph) -> None:
    """Positions are one too large wherever something is cached."""
    known = {value.name for value in g.main.input} | {name for node in g.main.node for name in node.output}
    if "position_ids" not in known:
        raise Inexpressible("no value is called position_ids")
    steps = _past_is_there(g, "fault.later")
    g.alter("position_ids", lambda value, out: [helper.make_node("Add", [value, "fault.later"], [out])])
    for added in reversed(steps):
        g.main.node.insert(0, added)


# The table.


@dataclass(frozen=True)
class Fault:
    """A fault in words, how it is planted, what a breach that names its place has in it.

    And the ways of feeding in which it shows.
    Every fault can be in every variant; of graphs that cannot have it `plant` raises `Inexpressible`.
    """

    words: str
    plant: Callable[[Graph], None]
    place: str
    shows: tuple[Way, ...] = WAYS

    def is_named(self, breach: str) -> bool:
        """Whether a breach, `provider: tier: message`, names the place in its message."""
        return re.search(self.place, breach.split(": ", 2)[-1]) is not None


_LAYER = r"layer 1\b"
_EXPERT = rf"{_LAYER}.*expert"
_ATTENTION = rf"{_LAYER}.*attention"
_EMBEDDING = r"embedding"
_HEAD = r"\bhead\b"
_CACHE = r"KV cache"
_PADDING = r"left padding"

_ALL = (
    Fault("two experts swapped", swap_two_experts, rf"{_EXPERT}.*\b0\b.*\b1\b"),
    Fault("gate and up swapped", swap_gate_and_up, _EXPERT),
    Fault("top-k weights not renormalized", leave_weights_unnormalized, rf"{_LAYER}|layer 0\b"),
    Fault("one expert's scale wrong by 2 %", scale_one_expert_by_2_percent, rf"{_EXPERT}.*\b2\b"),
    Fault("one group's scale wrong by half", scale_one_group, rf"{_EXPERT}.*\b2\b"),
    Fault("a row of zeros in an expert", zero_a_row, rf"{_EXPERT}.*\b2\b"),
    Fault("router quantized to 8 bits", quantize_the_router, rf"{_LAYER}.*router|router.*{_LAYER}"),
    Fault("0.05 added to a router logit", raise_a_router_logit, rf"{_LAYER}.*router|router.*{_LAYER}"),
    Fault(
        "0.05 added to a router logit behind its name",
        raise_a_router_logit_behind_its_name,
        rf"{_LAYER}.*(router|expert)",
    ),
    Fault("rope theta wrong", take_another_rope_theta, r"layer 0\b.*(attention|position|rotary)"),
    Fault("window dropped", drop_the_window, r"window"),
    Fault("RMS epsilon 1e-4", raise_epsilon, r"norm|layer 0\b"),
    Fault("an attention norm's entry wrong by 1 %", change_an_attention_norm, _LAYER),
    Fault("an FFN norm's entry wrong by 1 %", change_an_ffn_norm, _LAYER),
    Fault("the final norm's entry wrong by 1 %", change_the_final_norm, rf"final norm|{_HEAD}"),
    Fault("keys of one head + 1 %", stretch_keys_of_one_head, _ATTENTION),
    Fault("values of one head + 1 %", stretch_values_of_one_head, _ATTENTION),
    Fault("attention temperature 1 %", change_the_temperature, _ATTENTION),
    Fault("two embedding rows swapped", swap_embedding_rows, _EMBEDDING),
    Fault("one wrong embedding row", repeat_an_embedding_row, _EMBEDDING),
    Fault("a head row × 1.1", scale_a_head_row, _HEAD),
    Fault("two head rows swapped", swap_head_rows, _HEAD),
    Fault("logits × 1.001", scale_logits_by_a_thousandth, rf"{_HEAD}|\blogits\b"),
    Fault("logits × 1.02", scale_logits_by_2_percent, rf"{_HEAD}|\blogits\b"),
    Fault("KV cache off by one", shift_the_cache, _CACHE, STEPS),
    Fault("KV cache one token short", shorten_the_cache, _CACHE, STEPS),
    Fault("cached keys of one head + 1 %", stretch_cached_keys_of_one_head, _CACHE, STEPS),
    Fault("row 1 reads row 0's cache", mix_rows_of_the_cache, rf"{_CACHE}|\brow", ("batch",)),
    Fault("wrong pad side", take_the_wrong_pad_side, _PADDING, ("padding",)),
    Fault("padding not masked", read_padding, _PADDING, ("padding",)),
    Fault("positions of decode steps + 1", shift_positions_of_steps, rf"{_CACHE}|position", STEPS),
)
FAULTS: dict[str, Fault] = {fault.words: fault for fault in _ALL}
"""Every fault by its words."""


# Planting, and what it does.


def plant(
    exported: Exported, directory: Path, fault: Fault, blocks: torch.Tensor, setting: Setting | None = None
) -> Exported:
    """A package in `directory` with the fault.

    Its effect on ids `blocks` [N, S] is where it should be and nowhere else.

    Raises:
        Inexpressible: the graph cannot have it.
    """
    package = directory / "faulty"
    shutil.copytree(exported.package, package, ignore=shutil.ignore_patterns("*.data"))
    proto = onnx.load(exported.package / MODEL_NAME)
    setting = setting or Setting(tokens=find_tokens(blocks))
    fault.plant(Graph(proto, exported.twin, setting))
    onnx.save(proto, package / MODEL_NAME)
    effects = measure_effects(exported.package, package, blocks)
    # where inputs are rounded, a small change need not show in every text
    shown = max(effects[way] for way in fault.shows)
    assert shown > LEAST_EFFECT, f"'{fault.words}' changes nothing in {', '.join(fault.shows)}: {shown:.1e}"
    for way in set(WAYS) - set(fault.shows):
        assert effects[way] < MOST_SILENCE, f"'{fault.words}' changes {way} too, by {effects[way]:.1e}"
    return exported._replace(package=package)


def find_tokens(blocks: torch.Tensor) -> tuple[int, int]:
    """The two tokens that ids [N, S] have most often in their first row, so that a fault of theirs can be seen."""
    ids, counts = blocks[0].unique(return_counts=True)
    first, second = ids[counts.argsort(descending=True, stable=True)[:2]].tolist()
    return first, second


def measure_effects(right: Path, wrong: Path, blocks: torch.Tensor) -> dict[Way, float]:
    """How far apart the logits of two packages are, relative to the largest, in each way of feeding ids [N, S].

    No steps of a row cut a prefill's.
    """
    decoders = [Decoder(package, num_threads=1) for package in (right, wrong)]
    effects: dict[Way, float] = {}
    for way in WAYS:
        first, second = (_feed(decoder, way, blocks) for decoder in decoders)
        effects[way] = float(np.abs(first - second).max() / np.abs(first).max())
    return effects


def _feed(decoder: Decoder, way: Way, blocks: torch.Tensor) -> Array:
    """Logits at real tokens: of prefills, or of the steps after one."""
    ids = blocks[: 1 if way in ("prefill", "decode") else 2].numpy()
    length, steps = ids.shape[1], 8
    mask = np.ones_like(ids)
    if way == "padding":
        mask[1, : length // 3] = 0
    cache = decoder.new_cache(*ids.shape)
    if way in ("prefill", "padding"):
        logits = decoder.run(cache, ids, mask)["logits"]
        return logits[mask.astype(bool)]
    decoder.run(cache, ids[:, : length - steps])
    return np.concatenate(
        [decoder.run(cache, ids[:, n : n + 1])["logits"] for n in range(length - steps, length)], axis=1
    )
