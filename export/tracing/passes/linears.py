"""Plain products get their weights.

1. `Linear(x)` → `MatMul` with the transposed matrix of the module, or `MatMulNBits` where the twin has quantized it.
   A float matrix that is the embedding's table too, as of a tied head → `Transpose` of the table, which onnxruntime
   does once, and `MatMul`: the file has it once.
2. Where the module has a bias → `Add` after it.
3. A matrix that lies [in, out] is multiplied as it lies, in floats.
4. Matrices that lie in the checkpoint as several tensors, or as rows of one, become one matrix.

Left alone: products of other modules, as of a router: the trace has them with their weights, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.nodes.linear import Linear, add_linear
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.parameters import RowRange
from dense2moe.export.quantization.twin import FloatWeight, Twin, Weight
from dense2moe.export.tracing.passes.embedding import Tables
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker, weights_of
from dense2moe.export.tracing.tracer import Trace


def lower_linears(trace: Trace, graph: GraphWriter, twin: Twin, config: OnnxConfig, tables: Tables) -> None:
    """Replace every `Linear`; `tables` are the embedding's float tables."""
    seen: set[str] = set()
    for marker, name in find_markers(trace, "Linear"):
        if name in seen:
            raise ExportError(f"{name} is used twice in one forward; a traced model may use each matrix once")
        seen.add(name)
        (x,) = marker.inputs
        assert x is not None
        weights = weights_of(trace, twin, f"{name}.weight")
        if name in trace.transposed:
            y = _add_as_it_lies(graph, x, weights, name)
        elif (table := tables.get(trace.located[f"{name}.weight"])) is not None:
            y = _add_tied(graph, x, table, name)
        else:
            bits = config.bits_of("head" if name == trace.head else "attention")
            y = add_linear(graph, x, [Linear(weight) for weight in weights], name, bits)
        if f"{name}.bias" in trace.located:
            y = graph.op(
                "Add", [y, _add_bias(graph, twin, f"{name}.bias", trace.located[f"{name}.bias"])], f"{name}.biased"
            )
        replace_marker(trace, marker, graph, y)


def _add_tied(graph: GraphWriter, x: ir.Value, table: ir.Value, name: str) -> ir.Value:
    """The product of x [..., K] and a float table [N, K]."""
    if table.dtype != graph.dtype:
        table = graph.op("Cast", [table], f"{name}.widened", {"to": int(graph.dtype)})
    return graph.op("MatMul", [x, graph.op("Transpose", [table], f"{name}.weight", {"perm": [1, 0]})], name)


def _add_as_it_lies(graph: GraphWriter, x: ir.Value, weights: Sequence[Weight], name: str) -> ir.Value:
    """The product of x [..., K] and a float matrix [K, N]."""
    (weight,) = weights
    assert isinstance(weight, FloatWeight), f"{name}: the matrix is quantized, along the wrong axis"
    return graph.op("MatMul", [x, graph.float_weight(f"{name}.weight", weight.shape, weight.read)], name)


def _add_bias(graph: GraphWriter, twin: Twin, name: str, pieces: Sequence[RowRange]) -> ir.Value:
    """A vector of elements of the checkpoint, float32."""

    def read() -> torch.Tensor:
        return torch.cat(
            [twin.checkpoint.read_rows(piece.name, piece.start, piece.stop).to(torch.float32) for piece in pieces]
        )

    return graph.weight(name, ir.DataType.FLOAT, (sum(piece.stop - piece.start for piece in pieces),), read)
