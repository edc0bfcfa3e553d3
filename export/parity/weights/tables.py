"""Tables of integers: rows as the graph's own nodes make them.

A graph may gather a token's integers and scales and multiply them by nodes of any make: cast, less a zero point, times
a scale, blocks unpacked, padding cut off. Which nodes these are is their exporter's choice; so they are taken out of
the graph and computed, for all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

from dense2moe.export.nodes.writer import IR_VERSION
from dense2moe.export.parity.weights.matrix import FloatArray, GraphMatrix, Operator
from dense2moe.export.parity.weights.values import Values
from dense2moe.export.runtime.decoder import CPU

_CODES = (TensorProto.UINT8, TensorProto.INT8)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_VIEWS = ("Reshape", "Slice", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Cast")
_UNPACKING = (*_VIEWS, "Add", "Sub", "Mul", "Div", "Mod", "BitwiseAnd", "BitShift", "Concat", "Transpose")
_ROWS = 4096  # at once
_STANDARD = ("", "ai.onnx")
_REFUSALS = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


def find_tables(values: Values, opsets: Sequence[onnx.OperatorSetIdProto]) -> Iterator[tuple[GraphMatrix, list[str]]]:
    """Gathered tables of integers, each with its tensors' names.

    Tables whose nodes cannot be computed alone are left out.
    """
    standard = [each for each in opsets if each.domain in _STANDARD]
    for node in values.nodes:
        if node.op_type == "Gather" and _is_table(values, node) and values.tensors[node.input[0]].data_type in _CODES:
            fragment = _Fragment(values, standard, values.tensors[node.input[0]].dims[0])
            fragment.follow(node.input[1])
            if (width := fragment.measure()) is not None:
                shape = (fragment.num_rows, width)
                table = GraphMatrix(fragment.end, node.input[1], "table", Operator("Gather", 8), shape, fragment.read)
                yield table, list(fragment.gathered.values())


def _is_table(values: Values, node: NodeProto) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    tensor = values.tensors.get(node.input[0])
    return axis == 0 and tensor is not None and len(tensor.dims) > 1 and node.input[1] not in values.tensors


@dataclass
class _Fragment:
    """Nodes that make floats of gathered rows of integers.

    `gathered`: by the value that is gathered the name of its table. `end` is the last value, "" if there is none.
    """

    values: Values
    opsets: list[onnx.OperatorSetIdProto]
    num_rows: int
    gathered: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    end: str = ""

    def follow(self, ids: str) -> None:
        """Take nodes that depend on constants and gathered rows alone."""
        known: set[str] = set()
        floats: set[str] = set()  # of the row's integers, cast
        for node in self.values.nodes:
            out = node.output[0] if node.output else ""
            if node.op_type == "Gather" and node.input[1] == ids and _is_table(self.values, node):
                if self.values.tensors[node.input[0]].dims[0] == self.num_rows:
                    self.gathered[out] = node.input[0]
                    known.add(out)
                continue
            if not self._depends_on(node, known) or (
                self.end and (node.op_type not in _VIEWS or node.input[0] != self.end)
            ):
                continue
            self.nodes.append(node)
            known.add(out)
            multiplied = node.op_type == "Mul" and not floats.isdisjoint(node.input)
            if self.end or multiplied or node.op_type == "DequantizeLinear":
                self.end = out
            elif not floats.isdisjoint(node.input) or (
                node.op_type == "Cast" and any(a.i in _FLOATS for a in node.attribute if a.name == "to")
            ):
                floats.add(out)

    def _depends_on(self, node: NodeProto, known: set[str]) -> bool:
        given = {name for name in node.input if name}
        return (
            node.domain in _STANDARD
            and node.op_type in (*_UNPACKING, "DequantizeLinear")
            and not given.isdisjoint(known)
            and given <= known | self.values.tensors.keys()
        )

    def measure(self) -> int | None:
        """A row's width; None where the nodes make no rows."""
        if not self.end:
            return None
        try:
            first = self._compute(self._open(), 0, 1)
        except _REFUSALS:
            return None
        return first.shape[-1] if first.ndim > 1 and first.size == first.shape[-1] else None

    def read(self) -> FloatArray:
        """All rows."""
        session = self._open()
        parts = [self._compute(session, start, start + _ROWS) for start in range(0, self.num_rows, _ROWS)]
        return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])

    def _open(self) -> ort.InferenceSession:
        used = {name for node in self.nodes for name in node.input}
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(self.values.package.read_tensor(tensor)), name)
            for name, tensor in self.values.tensors.items()
            if name in used
        ]
        inputs = [
            helper.make_tensor_value_info(name, self.values.tensors[table].data_type, None)
            for name, table in self.gathered.items()
            if name in used
        ]
        graph = helper.make_graph(self.nodes, "table", inputs, [onnx.ValueInfoProto(name=self.end)], constants)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=IR_VERSION)
        return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])

    def _compute(self, session: ort.InferenceSession, start: int, stop: int) -> FloatArray:
        feeds = {
            each.name: self.values.array(self.gathered[each.name])[start:stop][None] for each in session.get_inputs()
        }
        found: FloatArray = session.run([self.end], feeds)[0].astype(np.float32)
        return found
