"""Matrix products of a graph, float or quantized."""

from __future__ import annotations

import onnx_ir as ir

from export.graph import MICROSOFT, GraphWriter
from export.twin import FloatWeight, QuantizedWeight, Weight

_ACCURACY_LEVELS = {8: 4, 32: 1}
"""`MatMulNBits` accuracy_level by the bits of the activations: 4 is int8, 1 is float32 (contrib operator documentation, onnxruntime)."""


def add_linear(graph: GraphWriter, x: ir.Value, weight: Weight, name: str, activation_bits: int) -> ir.Value:
    """x [..., K] times the transposed weight [N, K]; returns [..., N], called `name`."""
    match weight:
        case FloatWeight():
            rows, width = weight.shape
            transposed = graph.weight(f"{name}.weight", ir.DataType.FLOAT, (width, rows), lambda: weight.read().T)
            return graph.op("MatMul", [x, transposed], name)
        case QuantizedWeight():
            rows, width = weight.shape
            codes_shape = (rows, weight.num_blocks, weight.block_size * weight.bits // 8)
            codes = graph.weight(f"{name}.codes", ir.DataType.UINT8, codes_shape, lambda: weight.read().codes)
            scales = graph.weight(f"{name}.scales", ir.DataType.FLOAT, (rows * weight.num_blocks,), lambda: weight.read().scales.flatten())
            attributes = {"K": width, "N": rows, "bits": weight.bits, "block_size": weight.block_size}
            attributes["accuracy_level"] = _ACCURACY_LEVELS[activation_bits]
            return graph.op("MatMulNBits", [x, codes, scales], name, attributes, MICROSOFT)
