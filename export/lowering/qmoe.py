"""The `QMoE` operator of onnxruntime: quantized experts, one node a layer.

The integers are those of `dense2moe.export.quantization.blockwise`, stacked: fc1 [E, 2I, H * bits / 8] with gate and up
rows interleaved, fc2 [E, H, I * bits / 8], block-wise scales, and zero points where there are some. Where the block
does not divide the FFN's width I, the width is padded with neurons whose weights are exactly zero; they add nothing.
The hidden size cannot be padded, since the operator's input has it.

One file serves the CPU and CUDA where it is made for CUDA: float16, blocks of 64 or 128, and `weights_prepacked` 0,
without which CUDA would read the integers as packed for its kernels already, and compute garbage without a word. What
CUDA's kernel wants (contrib_ops/cuda/moe of onnxruntime 1.28 to 1.31): float16 or bfloat16, both widths multiples of
64, no separate fc3, no router_weights, no zero points. By construction: no CUDA device was at hand; the same file is
tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from dense2moe.export.lowering.fused import lower_logits, lower_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer
from dense2moe.export.lowering.moe import activation_refusal, swiglu_attributes
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter
from dense2moe.export.quantization.blockwise import Quantized, join, zero_point_bytes
from dense2moe.export.quantization.twin import QuantizedWeight, Weight
from dense2moe.export.variant import CUDA_BLOCKS

NAME = "qmoe"
MIN_ONNXRUNTIME = "1.23.2"  # the attribute block_size
MIN_ONNXRUNTIME_WIDE_BLOCKS = "1.24.3"  # before it, 4-bit blocks above 32 compute wrong values, without a word
MIN_ONNXRUNTIME_ZERO_POINTS = "1.24.1"  # the inputs from the twelfth on
MIN_ONNXRUNTIME_ONE_BLOCK = (
    "1.31"  # before it, one block along H is taken for a scale a row, and zero points of one along I are misread
)
MIN_ONNXRUNTIME_INT8_ACTIVATIONS = "1.31"  # the attribute accuracy_level
MIN_ONNXRUNTIME_CUDA = "1.28"  # the attribute weights_prepacked


def refusal(layer: MoeLayer) -> str | None:
    """Why this lowering cannot express the layer, or None."""
    gate = layer.experts[0].gate
    if not isinstance(gate, QuantizedWeight):
        return "the QMoE operator takes quantized weights"
    if gate.is_static:
        return "the QMoE operator takes no scales of activations"
    if layer.hidden_size % gate.block_size:
        return f"the hidden size {layer.hidden_size} is not a multiple of the block size {gate.block_size}"
    if layer.device == "cuda" and layer.element_type == "float32":
        return "CUDA's QMoE operator has no float32"
    if layer.device == "cuda" and gate.block_size not in CUDA_BLOCKS:
        return (
            f"CUDA's QMoE operator is given blocks of {' or '.join(map(str, CUDA_BLOCKS))}, not "
            f"{gate.block_size}; set quantize.block_size"
        )
    if layer.device == "cuda" and gate.zero_points:
        return "CUDA's QMoE operator has no zero points"
    if gate.bits == 8 and layer.activation_bits != 8:
        return "with 8-bit weights the operator reads activations in 8 bits"
    return activation_refusal(layer)


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes the layer correctly.

    Every minor release from 1.22 to 1.32 was tried on the CPU.
    """
    gate, down = _quantized(layer.experts[0].gate), _quantized(layer.experts[0].down)
    if gate.bits == 4 and layer.activation_bits == 8:
        return MIN_ONNXRUNTIME_INT8_ACTIVATIONS
    if gate.num_blocks == 1 or (down.zero_points and down.num_blocks == 1):
        return MIN_ONNXRUNTIME_ONE_BLOCK
    if layer.device == "cuda":
        return MIN_ONNXRUNTIME_CUDA
    if gate.bits == 4 and gate.block_size > 32:
        return MIN_ONNXRUNTIME_WIDE_BLOCKS
    return MIN_ONNXRUNTIME_ZERO_POINTS if gate.zero_points else MIN_ONNXRUNTIME


def lower(graph: GraphWriter, layer: MoeLayer, x: MoeInput) -> ir.Value:
    """The layer's output [B, S, H]."""
    return lower_logits(graph, layer, x, add_operator)


def lower_chosen(
    graph: GraphWriter, layer: MoeLayer, tokens: ir.Value, weights: ir.Value, chosen: ir.Value
) -> ir.Value:
    """The layer's output [T, H], from experts chosen outside.

    For tokens [T, H], and experts with their weights [T, K].
    """
    return lower_routes(graph, layer, tokens, weights, chosen, add_operator)


def add_operator(graph: GraphWriter, layer: MoeLayer, x: ir.Value, logits: ir.Value, output: str) -> ir.Value:
    """The layer's output in float32, by the operator and its logits.

    Of the shape of x [..., H]; the logits [T, E] are the router's, or encode routes.

    Both are of the graph's element type.
    """
    down = _quantized(layer.experts[0].down)
    bits, block = down.bits, down.block_size
    width, height = layer.hidden_size, down.num_blocks * block
    num_experts = layer.gate.num_experts

    def fc1() -> Quantized:
        return join(
            [_interleave(_quantized(e.gate).read(), _quantized(e.up).read(), height) for e in layer.experts],
            torch.stack,
        )

    def fc2() -> Quantized:
        return join([_quantized(e.down).read() for e in layer.experts], torch.stack)

    def add(
        name: str, rows: int, columns: int, read: Callable[[], Quantized]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        codes = graph.weight(
            f"{layer.name}.{name}.codes",
            ir.DataType.UINT8,
            (num_experts, rows, columns * bits // 8),
            lambda: read().codes.flatten(2),
        )
        scales = graph.scales(
            f"{layer.name}.{name}.scales", (num_experts, rows, columns // block), lambda: read().scales, graph.dtype
        )
        if not down.zero_points:
            return codes, scales, None
        shape = (num_experts, rows, zero_point_bytes(columns, bits, block))
        return (
            codes,
            scales,
            graph.weight(
                f"{layer.name}.{name}.zero_points", ir.DataType.UINT8, shape, lambda: read().own_zero_points()
            ),
        )

    fc1_codes, fc1_scales, fc1_zero_points = add("fc1", 2 * height, width, fc1)
    fc2_codes, fc2_scales, fc2_zero_points = add("fc2", width, height, fc2)
    attributes = {**swiglu_attributes(layer.gate), "expert_weight_bits": bits, "block_size": block}
    if bits == 4 and layer.activation_bits == 8:
        attributes["accuracy_level"] = 4
    if layer.device == "cuda":
        attributes["weights_prepacked"] = 0
    inputs: list[ir.Value | None] = [x, logits, fc1_codes, fc1_scales, None, fc2_codes, fc2_scales]
    if down.zero_points:
        inputs += [None, None, None, None, fc1_zero_points, fc2_zero_points]
    return graph.widen(graph.op("QMoE", inputs, output, attributes, MICROSOFT))


def _quantized(weight: Weight) -> QuantizedWeight:
    assert isinstance(weight, QuantizedWeight)
    return weight


def _interleave(gate: Quantized, up: Quantized, height: int) -> Quantized:
    """Rows interleaved as g0, u0, g1, u1, …, padded with zeros.

    Up to 2 * height rows; the zero rows have scale 0.
    """

    def combine(parts: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack(parts, dim=1).flatten(0, 1)
        return torch.cat([rows, rows.new_zeros(2 * height - len(rows), *rows.shape[1:])])

    return join([gate, up], combine)
