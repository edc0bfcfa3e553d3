"""Matrix products of a graph, float or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter
from dense2moe.export.quantization.blockwise import Quantized, join, zero_point_bytes
from dense2moe.export.quantization.twin import Bias, FloatWeight, QuantizedWeight, Weight

_ACCURACY_LEVELS = {8: 4, 32: 1}
"""`MatMulNBits` accuracy_level by the bits of the activations.

4 is int8, 1 is float32 (contrib operator documentation, onnxruntime).
It is the CPU's: CUDA's kernel reads activations in their own type whatever it says.
"""

_MIN_ONNXRUNTIME = {4: "1.20", 8: "1.23", 32: "1.20"}
"""The oldest onnxruntime that computes a product rightly on the CPU, by the bits of its weights.

1.20 is the oldest that was tried.
"""


@dataclass(frozen=True)
class Linear:
    """A matrix [N, K], and a bias [N] for its product."""

    weight: Weight
    bias: Bias | None = None


def oldest_onnxruntime(weight: Weight) -> str:
    """The oldest onnxruntime that multiplies by this kind of weight."""
    return _MIN_ONNXRUNTIME[weight.bits if isinstance(weight, QuantizedWeight) else 32]


def add_linear(
    graph: GraphWriter, x: ir.Value, linears: Linear | Sequence[Linear], name: str, activation_bits: int
) -> ir.Value:
    """x [..., K] times a transposed matrix [N, K], plus its bias.

    Or of several matrices of one kind, stacked by rows; all of them have a bias, or none has. Returns [..., N], called
    `name`. x and what is returned are of the graph's element type. Where columns were scaled before they were
    quantized, x is divided by their scales.

    A bias is a node of its own, whatever multiplies: as it loads, onnxruntime makes one of `MatMul` and it, and where
    its kernel takes a bias, as the CPU's does, one of `MatMulNBits` and it.
    """
    parts = (linears,) if isinstance(linears, Linear) else tuple(linears)
    weights, biases = [part.weight for part in parts], [part.bias for part in parts if part.bias is not None]
    if not biases:
        return _add_product(graph, x, weights, name, activation_bits)
    assert len(biases) == len(parts), f"{name}: some parts have a bias, some have none"
    product = _add_product(graph, x, weights, f"{name}_product", activation_bits)
    bias = graph.float_weight(
        "+".join(own.name for own in biases),
        (sum(own.size for own in biases),),
        lambda: torch.cat([own.read() for own in biases]),
    )
    return graph.op("Add", [product, bias], name)


def _add_product(graph: GraphWriter, x: ir.Value, parts: Sequence[Weight], name: str, activation_bits: int) -> ir.Value:
    rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    floats = [part for part in parts if isinstance(part, FloatWeight)]
    if len(floats) == len(parts):
        transposed = graph.float_weight(
            f"{name}.weight", (width, rows), lambda: torch.cat([part.read() for part in floats]).T
        )
        return graph.op("MatMul", [x, transposed], name)
    integers = [part for part in parts if isinstance(part, QuantizedWeight)]
    first = integers[0]
    assert len(integers) == len(parts), f"{name}: some parts are quantized, some not"
    assert len({(part.bits, part.block_size, part.zero_points) for part in integers}) == 1, (
        f"{name}: parts of several kinds"
    )
    if first.is_static:
        return _add_static(graph, x, integers, name)
    if (columns := first.read_column_scales()) is not None:
        assert len(parts) == 1, f"{name}: parts that read different things"
        x = graph.op("Mul", [x, graph.constant(f"{name}.input_factors", columns.reciprocal().numpy())], f"{name}.input")

    def read() -> Quantized:
        return join([part.read() for part in integers])

    codes_shape = (rows, first.num_blocks, first.block_size * first.bits // 8)
    content = first.content if len(parts) == 1 else None
    codes = graph.weight(f"{name}.codes", ir.DataType.UINT8, codes_shape, lambda: read().codes, content)
    scales_shape = (rows * first.num_blocks,)
    scales = graph.scales(f"{name}.scales", scales_shape, lambda: read().scales.flatten(), graph.dtype, content)
    inputs = [x, codes, scales]
    if first.zero_points:
        size = rows * zero_point_bytes(width, first.bits, first.block_size)
        own = None if content is None else f"{content}, zero points"
        inputs.append(
            graph.weight(
                f"{name}.zero_points", ir.DataType.UINT8, (size,), lambda: read().own_zero_points().flatten(), own
            )
        )
    attributes = {
        "K": width,
        "N": rows,
        "bits": first.bits,
        "block_size": first.block_size,
        "accuracy_level": _ACCURACY_LEVELS[activation_bits],
    }
    return graph.op("MatMulNBits", inputs, name, attributes, MICROSOFT)


def _add_static(graph: GraphWriter, x: ir.Value, parts: Sequence[QuantizedWeight], name: str) -> ir.Value:
    """The product of x, rounded to 8 bits, and row-scaled weights.

    In the form that providers recognize which compute in 8 bits.
    """
    rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    assert {part.input_scale for part in parts} == {parts[0].input_scale}, f"{name}: parts that read different things"
    scale, zero = (
        graph.constant(f"{name}.input_scale", np.array(parts[0].input_scale, np.float32)),
        graph.constant("zero_int8", np.array(0, np.int8)),
    )
    integers = graph.op("QuantizeLinear", [x, scale, zero], f"{name}.input_integers")
    rounded = graph.op("DequantizeLinear", [integers, scale, zero], f"{name}.input_rounded")

    def codes() -> torch.Tensor:
        signed = torch.cat([part.read().codes for part in parts]).to(torch.int16) - 128
        return signed.view(rows, width).T

    weight = graph.weight(f"{name}.codes", ir.DataType.INT8, (width, rows), codes)
    scales = graph.weight(
        f"{name}.scales",
        ir.DataType.FLOAT,
        (rows,),
        lambda: torch.cat([part.read().scales.flatten() for part in parts]),
    )
    # Where onnxruntime turns weights unsigned, 1.28 crashes if there are no zero points, and every version refuses
    # those that two products share.
    zeros = graph.constant(f"{name}.zero_points", np.zeros(rows, np.int8))
    return graph.op(
        "MatMul", [rounded, graph.op("DequantizeLinear", [weight, scales, zeros], f"{name}.weight", {"axis": 1})], name
    )


def add_exact_linear(graph: GraphWriter, x: ir.Value, weight: Weight, name: str) -> ir.Value:
    """x [..., K] times a transposed float weight, always in float32.

    Whatever the graph's element type; the weight is [N, K].

    [..., N], called `name`.
    """
    assert isinstance(weight, FloatWeight), f"{name}: the weight is quantized"
    rows, width = weight.shape
    return graph.op(
        "MatMul", [x, graph.weight(f"{name}.weight", ir.DataType.FLOAT, (width, rows), lambda: weight.read().T)], name
    )
