"""The embedding: rows gathered from a float or quantized table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from dense2moe.export import names
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter, int64
from dense2moe.export.quantization.blockwise import unpack, zero_point_bytes
from dense2moe.export.quantization.twin import FloatWeight, QuantizedWeight, Weight

TABLE = "embedding.weight"
"""The name of a float table."""


def add_embedding(graph: GraphWriter, weight: Weight, input_ids: ir.Value) -> ir.Value:
    """Embedding rows, float32 [B, S, H], for input_ids [B, S].

    Rows of the table `weight`; the value is called `embedded`. Rows are float32, and exact, in every graph; a float
    table is of the graph's float type, and its rows are cast. A tied head's integers are these.
    """
    match weight:
        case FloatWeight():
            table = graph.stored_weight(TABLE, weight.shape, weight.read)
            if graph.float_type == "float32":
                return graph.op("Gather", [table, input_ids], names.EMBEDDED)
            rows = graph.op("Gather", [table, input_ids], f"{names.EMBEDDED}_rows")
            return graph.op("Cast", [rows], names.EMBEDDED, {"to": int(ir.DataType.FLOAT)})
        case QuantizedWeight():
            if (scales := weight.read_column_scales()) is not None:
                rows = _add_rows(graph, weight, input_ids, f"{names.EMBEDDED}_scaled")
                return graph.op(
                    "Mul", [rows, graph.constant("embedding.factors", scales.reciprocal().numpy())], names.EMBEDDED
                )
            return _add_rows(graph, weight, input_ids, names.EMBEDDED)


def _add_rows(graph: GraphWriter, weight: QuantizedWeight, input_ids: ir.Value, name: str) -> ir.Value:
    """Rows as the table's integers store them, float32 [B, S, H].

    The value is called `name`.
    """
    # The same integers as the tied head's, flat along the hidden dimension, as this operator reads them.
    num_rows, columns = weight.shape[0], weight.num_blocks * weight.block_size
    misread = weight.zero_points and weight.num_blocks * weight.bits % 8 > 0
    if columns != weight.shape[1] or misread or weight.is_static:
        return _add_padded_embedding(graph, weight, input_ids, name)
    codes_shape = (num_rows, columns * weight.bits // 8)
    codes = graph.weight(
        "embedding.codes", ir.DataType.UINT8, codes_shape, lambda: weight.read().codes.flatten(1), weight.content
    )
    scales_shape = (num_rows, weight.num_blocks)
    scales = graph.scales(
        "embedding.scales", scales_shape, lambda: weight.read().scales, ir.DataType.FLOAT, weight.content
    )
    inputs = [codes, input_ids, scales]
    if weight.zero_points:
        shape, own = (
            (num_rows, zero_point_bytes(weight.shape[1], weight.bits, weight.block_size)),
            f"{weight.content}, zero points",
        )
        inputs.append(
            graph.weight(
                "embedding.zero_points", ir.DataType.UINT8, shape, lambda: weight.read().own_zero_points(), own
            )
        )
    attributes = {"bits": weight.bits, "block_size": weight.block_size, "gather_axis": 0, "quantize_axis": 1}
    return graph.op("GatherBlockQuantized", inputs, name, attributes, MICROSOFT)


def _add_padded_embedding(graph: GraphWriter, weight: QuantizedWeight, input_ids: ir.Value, name: str) -> ir.Value:
    """Rows of a padded table, which the operator cannot read.

    Codes and scales of the rows are gathered and dequantized, and the padding is cut off. That is a width that the
    block does not divide, and rows whose zero points do not fill their last byte: onnxruntime misreads them before
    1.27. And it is static quantization, which is for providers of any make, and has standard operators alone.
    """
    codes_shape = (weight.shape[0], weight.num_blocks, weight.block_size * weight.bits // 8)
    codes = graph.weight("embedding.codes", ir.DataType.UINT8, codes_shape, lambda: weight.read().codes, weight.content)
    scales_shape = (weight.shape[0], weight.num_blocks)
    if weight.is_static:
        scales = graph.weight("embedding.scales", ir.DataType.FLOAT, scales_shape, lambda: weight.read().scales)
    else:
        scales = graph.scales(
            "embedding.scales", scales_shape, lambda: weight.read().scales, ir.DataType.FLOAT, weight.content
        )
    rows = graph.op("Gather", [codes, input_ids], "embedding.row_codes")
    row_scales = graph.op("Gather", [scales, input_ids], "embedding.row_scales")
    last = graph.constant("axis_last", int64(-1))
    if weight.bits == 4:
        sixteen = graph.constant("sixteen", np.array(16, np.uint8))
        high = graph.op("Div", [rows, sixteen], "embedding.high")
        low = graph.op("Sub", [rows, graph.op("Mul", [high, sixteen], "embedding.high_part")], "embedding.low")
        pair = [
            graph.op("Unsqueeze", [value, last], f"embedding.{name}_column")
            for name, value in (("low", low), ("high", high))
        ]
        joined = graph.op("Concat", pair, "embedding.nibbles", {"axis": -1})
        blocked = graph.constant("embedding.blocked", int64(0, 0, weight.num_blocks, weight.block_size))
        rows = graph.op("Reshape", [joined, blocked], "embedding.integers")
    values = graph.op("Cast", [rows], "embedding.unsigned", {"to": int(ir.DataType.FLOAT)})
    if weight.zero_points:  # a byte each: these are few, and what unpacks them would be more nodes

        def read() -> torch.Tensor:
            return unpack(weight.read().own_zero_points(), weight.bits)[:, : weight.num_blocks]

        table = graph.weight("embedding.zero_points", ir.DataType.UINT8, scales_shape, read)
        row_zero_points = graph.op("Gather", [table, input_ids], "embedding.row_zero_points")
        floats = graph.op("Cast", [row_zero_points], "embedding.row_zero_points_float", {"to": int(ir.DataType.FLOAT)})
        zero_point = graph.op("Unsqueeze", [floats, last], "embedding.zero_point_column")
    else:
        zero_point = graph.constant("embedding.zero_point", np.array(1 << (weight.bits - 1), np.float32))
    signed = graph.op("Sub", [values, zero_point], "embedding.signed")
    column = graph.op("Unsqueeze", [row_scales, last], "embedding.scale_column")
    scaled = graph.op("Mul", [signed, column], "embedding.scaled")
    flat = graph.op("Reshape", [scaled, graph.constant("embedding.flat", int64(0, 0, -1))], "embedding.padded")
    bounds = [
        graph.constant(f"embedding.{name}", int64(value))
        for name, value in (("start", 0), ("end", weight.shape[1]), ("axis", 2))
    ]
    return graph.op("Slice", [flat, *bounds], name)
