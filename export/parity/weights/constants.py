"""Matrices and vectors of any exporter's graph, as float32 numbers.

A product may read its matrix as it is, turned, cast, or as integers with scales. Here each becomes a `GraphMatrix`:
float32 rows [N, K], read from the file when they are asked for. Formats are those of the operators' documentation (ONNX
`DequantizeLinear`; onnxruntime `MatMulNBits`, `QMoE`, `GatherBlockQuantized`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from dense2moe.export.graph.branches import take_branches
from dense2moe.export.opening import OpenedPackage, open_graphs
from dense2moe.export.parity.weights.matrix import INT8, Constants, FloatArray, GraphMatrix, GraphNorm, Operator
from dense2moe.export.parity.weights.norms import find_norms
from dense2moe.export.parity.weights.tables import find_tables
from dense2moe.export.parity.weights.turned import squeeze
from dense2moe.export.parity.weights.values import NARROW, Values
from dense2moe.export.quantization.simulation import StaticRounding

_LEAST_MATRIX = 256  # bytes of integers
_BIASES: Final[dict[str, tuple[int, ...]]] = {"MoE": (3, 5, 7), "QMoE": (4, 7, 10)}
"""Inputs of operators that are biases of experts."""
_ROUNDINGS = ("QuantizeLinear", "DynamicQuantizeLinear")
_ENDS = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
}
"""The least and the largest integer that `QuantizeLinear` makes."""


def read_constants(directory: Path) -> Constants:
    """A package's matrices and vectors, from all graphs and all branches.

    Raises:
        ExportError: no package there, or a damaged one.
    """
    matrices: dict[tuple[str, str], GraphMatrix] = {}
    vectors: dict[tuple[str, str], FloatArray] = {}
    norms: dict[tuple[str, str], GraphNorm] = {}
    unread: list[str] = []
    biases: list[FloatArray] = []
    rounded: list[str] = []
    ways = [(package, model) for package in open_graphs(directory) for model in take_branches(package.model)]
    for package, model in ways:
        graph, file = _Graph(model.graph, package), package.name
        matrices |= {(file, matrix.place): matrix for node in graph.nodes for matrix in graph.matrices_of(node)}
        matrices |= {(file, matrix.place): matrix for matrix in graph.tables(list(model.opset_import))}
        vectors |= {(file, name): vector for name, vector in graph.vectors()}
        norms |= {(file, norm.value): norm for norm in find_norms(graph.values)}
        matrices |= {(file, matrix.place): matrix for matrix in graph.stored()}
        unread += graph.unread()
        biases += graph.expert_biases()
        rounded += [node.input[0] for node in graph.nodes if node.op_type in _ROUNDINGS]
    read = {matrix.given for matrix in matrices.values() if matrix.input_rounding is not None}
    return Constants(
        tuple(matrices.values()),
        tuple(vectors.values()),
        tuple(norms.values()),
        tuple(dict.fromkeys(unread)),
        tuple(biases),
        tuple(dict.fromkeys(name for name in rounded if name not in read)),
    )


class _Graph:
    """Nodes and constants of one graph, by name."""

    def __init__(self, graph: onnx.GraphProto, package: OpenedPackage) -> None:
        self.values = Values(graph, package)
        self.nodes, self.tensors, self.makers = self.values.nodes, self.values.tensors, self.values.makers
        self.read: set[str] = set()

    def matrices_of(self, node: NodeProto) -> Iterator[GraphMatrix]:
        """The matrices that a node multiplies by or takes rows of."""
        for matrix in self._matrices_of(node):
            for source in (source for name in node.input if name for source in self.values.chain(name) or ()):
                self.read |= {source, *(self.makers[source].input if source in self.makers else ())}
            yield matrix

    def _matrices_of(self, node: NodeProto) -> Iterator[GraphMatrix]:
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        match node.op_type:
            case "MatMulNBits":
                yield from self._integers(node, settings)
            case "QMoE":
                yield from self._expert_integers(node, settings)
            case "MoE":
                yield from self._experts(node)
            case "GatherBlockQuantized":
                yield from self._integer_table(node, settings)
            case "MatMul" | "FusedMatMul" | "Gemm":
                yield from self._product(node, settings)
            case "Gather" if (
                (found := self.values.find(node.input[0])) is not None
                and len(found[1]) == 2
                and settings.get("axis", 0) == 0
            ):
                read, shape, narrow = found
                if _is_float(self.values.source(node.input[0])):
                    yield self._with_factors(
                        GraphMatrix(
                            node.output[0],
                            node.input[1],
                            "table",
                            Operator("Gather"),
                            (shape[0], shape[1]),
                            read,
                            narrow=narrow,
                        )
                    )

    def tables(self, opsets: list[onnx.OperatorSetIdProto]) -> Iterator[GraphMatrix]:
        """Tables of integers that nodes of any make dequantize."""
        for matrix, sources in find_tables(self.values, opsets):
            self.read |= set(sources)
            yield self._with_factors(matrix)

    def stored(self) -> Iterator[GraphMatrix]:
        """Float matrices that no product reads, as stored and transposed."""
        filters = {node.input[1] for node in self.nodes if node.op_type == "Conv"}
        for name, tensor in self.tensors.items():
            dims = squeeze(tensor.dims) if name in filters else tuple(tensor.dims)
            if name in self.read or not _is_float(tensor) or len(dims) < 2 or min(dims[-2:]) < 2:
                continue
            rows, width = int(np.prod(dims[:-1])), int(dims[-1])
            narrow = NARROW.get(tensor.data_type)
            yield GraphMatrix(
                name,
                "",
                "stored",
                Operator("stored"),
                (rows, width),
                partial(self._stored, name, dims, False),
                narrow=narrow,
            )
            turned = (rows // int(dims[-2]) * width, int(dims[-2]))
            yield GraphMatrix(
                name,
                "",
                "stored",
                Operator("stored"),
                turned,
                partial(self._stored, name, dims, True),
                "turned",
                narrow=narrow,
            )

    def _stored(self, name: str, dims: Sequence[int], turned: bool) -> FloatArray:
        whole = self.values.array(name).astype(np.float32).reshape(dims)
        whole = np.swapaxes(whole, -1, -2) if turned else whole
        return np.ascontiguousarray(whole.reshape(-1, whole.shape[-1]))

    def unread(self) -> list[str]:
        """Integers that may be matrices, but no product reads."""
        kinds = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT4, TensorProto.INT4)
        many = (
            name
            for name, tensor in self.tensors.items()
            if tensor.data_type in kinds and np.prod(tensor.dims) >= _LEAST_MATRIX
        )
        return [name for name in many if name not in self.read]

    def vectors(self) -> Iterator[tuple[str, FloatArray]]:
        """Float constants with one dimension larger than 1."""
        for name, tensor in self.tensors.items():
            dims = [size for size in tensor.dims if size != 1]
            if len(dims) == 1 and _is_float(tensor):
                yield name, self.values.array(name).astype(np.float32).reshape(-1)

    def expert_biases(self) -> Iterator[FloatArray]:
        """Biases [E, N] of the operators that compute all experts."""
        for node in self.nodes:
            for place in _BIASES.get(node.op_type, ()):
                found = self.values.find(node.input[place]) if place < len(node.input) and node.input[place] else None
                if found is not None:
                    read, shape, _ = found
                    yield read().reshape(shape)

    def _product(self, node: NodeProto, settings: dict[str, Any]) -> Iterator[GraphMatrix]:
        found = self.values.find(node.input[1])
        if found is None or len(found[1]) < 2:
            return
        read, shape, narrow = found
        turned = not settings.get("transB", 0)
        rows, width = (shape[-1], shape[-2]) if turned else (shape[-2], shape[-1])
        operator, rounding, given = Operator(node.op_type), None, node.input[0]
        if (weight := self.makers.get(node.input[1])) is not None and weight.op_type == "DequantizeLinear":
            if (rounding := self._static_rounding(given)) is not None:
                given = self.makers[self.makers[given].input[0]].input[0]  # before it is rounded
            operator = Operator("QDQ" if rounding is not None else "DQ", 8)

        def one(number: int) -> FloatArray:
            whole = read().reshape(-1, *shape[-2:])[number]
            return np.ascontiguousarray(whole.T if turned else whole)

        many = int(np.prod(shape[:-2])) if len(shape) > 2 else 0
        for number in range(max(many, 1)):
            expert = number if many else None
            yield self._with_factors(
                GraphMatrix(
                    node.output[0],
                    given,
                    "product",
                    operator,
                    (rows, width),
                    partial(one, number),
                    narrow=narrow,
                    expert=expert,
                    input_rounding=rounding,
                )
            )

    def _static_rounding(self, name: str) -> StaticRounding | None:
        """How one scale of the file rounds a value; None without."""
        dequantized = self.makers.get(name)
        if dequantized is None or dequantized.op_type != "DequantizeLinear":
            return None
        quantized = self.makers.get(dequantized.input[0])
        if quantized is None or quantized.op_type != "QuantizeLinear" or quantized.input[1] not in self.tensors:
            return None
        scale = self.values.array(quantized.input[1])
        zero = self.tensors.get(quantized.input[2]) if len(quantized.input) > 2 else None
        ends = _ENDS[TensorProto.UINT8] if zero is None else _ENDS.get(zero.data_type)
        if scale.size != 1 or ends is None:
            return None
        point = 0 if zero is None else int(self.values.array(quantized.input[2]).reshape(-1)[0])
        return StaticRounding(float(scale.reshape(-1)[0]), ends[0] - point, ends[1] - point)

    def _integers(self, node: NodeProto, settings: dict[str, Any]) -> Iterator[GraphMatrix]:
        rows, width, bits, block = settings["N"], settings["K"], settings.get("bits", 4), settings["block_size"]
        names = [*node.input, "", "", "", ""]
        if self.values.find(names[1]) is None or self.values.find(names[2]) is None:
            return
        operator = Operator("MatMulNBits", bits, block, settings.get("accuracy_level", 0) == INT8, bool(names[3]))
        read = partial(self.values.dequantize, (names[1], names[2], names[3]), operator, (rows, width))
        yield self._with_factors(GraphMatrix(node.output[0], names[0], "product", operator, (rows, width), read))

    def _integer_table(self, node: NodeProto, settings: dict[str, Any]) -> Iterator[GraphMatrix]:
        names = [*node.input, ""]
        codes = self.tensors.get(names[0])
        if codes is None or settings.get("gather_axis", 0) != 0 or len(codes.dims) != 2:
            return
        bits, block = settings.get("bits", 4), settings.get("block_size", 128)
        width = codes.dims[1] * (8 // bits if codes.data_type == TensorProto.UINT8 else 1)
        operator, shape = (
            Operator("GatherBlockQuantized", bits, block, zero_points=bool(names[3])),
            (codes.dims[0], width),
        )
        yield self._with_factors(
            GraphMatrix(
                node.output[0],
                names[1],
                "table",
                operator,
                shape,
                partial(self.values.dequantize, (names[0], names[2], names[3]), operator, shape),
            )
        )

    def _expert_integers(self, node: NodeProto, settings: dict[str, Any]) -> Iterator[GraphMatrix]:
        bits, block = settings.get("expert_weight_bits", 4), settings.get("block_size", 0)
        names = [*node.input, *[""] * 15]
        rounds = bits == 8 or settings.get("accuracy_level", 0) == INT8
        for part, codes, scales, zeros in (("fc1", 2, 3, 11), ("fc2", 5, 6, 12)):
            if names[codes] not in self.tensors or self.values.find(names[scales]) is None:
                continue
            dims = self.tensors[names[codes]].dims
            shape = (int(dims[1]), int(dims[2]) * 8 // bits)
            operator = Operator("QMoE", bits, block or shape[1], rounds, bool(names[zeros]))
            for expert in range(dims[0]):
                read = partial(
                    self.values.dequantize, (names[codes], names[scales], names[zeros]), operator, shape, expert
                )
                yield self._with_factors(
                    GraphMatrix(
                        node.output[0], node.input[0], "experts", operator, shape, read, part=part, expert=expert
                    )
                )

    def _experts(self, node: NodeProto) -> Iterator[GraphMatrix]:
        for part, place in (("fc1", 2), ("fc2", 4)):
            found = self.values.find(node.input[place]) if place < len(node.input) and node.input[place] else None
            if found is None:
                continue
            read, shape, narrow = found
            for expert in range(shape[0]):
                own = partial(_take, read, expert)
                yield self._with_factors(
                    GraphMatrix(
                        node.output[0],
                        node.input[0],
                        "experts",
                        Operator("MoE"),
                        (shape[1], shape[2]),
                        own,
                        part=part,
                        expert=expert,
                        narrow=narrow,
                    )
                )

    def _with_factors(self, matrix: GraphMatrix) -> GraphMatrix:
        """The matrix multiplied by its input's or rows' factors.

        What its input, or the rows of a table, are multiplied by.
        """
        width = matrix.shape[1]
        is_table = matrix.use == "table"
        factors = self._row_factors(matrix.value, width) if is_table else self._factors(matrix.given, width)
        return replace(matrix, input_factors=factors)

    def _factors(self, given: str, width: int) -> Callable[[], FloatArray] | None:
        """A vector [K] that multiplies a value just before its use."""
        maker = self.makers.get(given)
        if maker is None or maker.op_type != "Mul":
            return None
        return self._vector(list(maker.input), width)

    def _row_factors(self, value: str, width: int) -> Callable[[], FloatArray] | None:
        """A vector [K] that multiplies a table's rows just after gathering."""
        reader = next((node for node in self.nodes if node.op_type == "Mul" and value in node.input), None)
        return None if reader is None else self._vector(list(reader.input), width)

    def _vector(self, names: list[str], width: int) -> Callable[[], FloatArray] | None:
        found = next(
            (
                name
                for name in names
                if (source := self.tensors.get(name)) is not None and list(source.dims)[-1:] == [width]
            ),
            None,
        )
        return None if found is None else lambda: self.values.array(found).astype(np.float32).reshape(-1)


def _take(read: Callable[[], FloatArray], place: int) -> FloatArray:
    """One of several matrices that are stacked."""
    return np.ascontiguousarray(read()[place])


def _is_float(tensor: TensorProto) -> bool:
    return tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, *NARROW)
