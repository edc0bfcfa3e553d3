"""A graph in which faults are planted, its parts found by what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dense2moe.export.coverage import find_decoder_family
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.architecture import Architecture
from tests.faults.stores import FLOATS, Array, Dequantized, Floats, Inexpressible, Integers, Rows, Store, read_tensor

Alter = Callable[[str, str], list[onnx.NodeProto]]
"""Nodes from a value's name to the name of what takes its place."""
_PAST = "past_key_values."


@dataclass(frozen=True)
class Setting:
    """Where faults are planted: a layer, experts, a head of keys, tokens that the text has, and weights to a group."""

    layer: int = 1
    expert: int = 2
    head: int = 0
    tokens: tuple[int, int] = (65, 66)
    group: int = 16


class Graph:
    """A package's graph, weights loaded, and the checkpoint whose weights they are."""

    def __init__(self, proto: onnx.ModelProto, reference: Path, setting: Setting | None = None) -> None:
        self.main, self.at = proto.graph, setting or Setting()
        self.checkpoint = open_checkpoint(reference)
        self.graphs = list(walk(proto.graph))
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
                node.input[0] = self.constant(read_tensor(tensor), "fault.table")

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
                            and tensor.data_type in FLOATS
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
            if store.is_table == is_table and (rows := locate(matrix, store.values)) is not None
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


def walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g)


def locate(matrix: Array, values: Array) -> Array | None:
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
