"""The `QMoE` operator of onnxruntime: quantized experts, one node a layer.

The integers are those of `dense2moe.export.quantization.blockwise`, stacked: fc1 [E, 2I, H * bits / 8] with gate and up
rows interleaved, or [E, I, H * bits / 8] without a gate, fc2 [E, H, I * bits / 8], block-wise scales, zero points where
there are some, and float biases as inputs 4 and 7. Where the block does not divide the FFN's width I, the width is
padded with neurons whose weights are exactly zero; they add nothing. The hidden size cannot be padded, since the
operator's input has it.

One file serves the CPU and CUDA where it is made for CUDA: float16, blocks of 64 or 128, and `weights_prepacked` 0,
without which CUDA would read the integers as packed for its kernels already, and compute garbage without a word. What
CUDA's kernel wants (contrib_ops/cuda/moe of onnxruntime 1.28 to 1.31): float16 or bfloat16, both widths multiples of
64, no separate fc3, no router_weights, no zero points. By construction: no CUDA device was at hand; the same file is
tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from dense2moe.export.lowering.fused import lower_logits, lower_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer
from dense2moe.export.lowering.moe import activation_refusal, add_bias, interleave, operator_attributes
from dense2moe.export.nodes.linear import Linear
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter
from dense2moe.export.quantization.blockwise import Quantized, join, zero_point_bytes
from dense2moe.export.quantization.twin import QuantizedWeight
from dense2moe.export.variant import CUDA_BLOCKS

NAME = "qmoe"
MIN_ONNXRUNTIME = "1.23.2"  # the attribute block_size
MIN_ONNXRUNTIME_WIDE_BLOCKS = (
    "1.24.3"  # before it, 4-bit blocks above 32, and one block along I, compute wrong values, without a word
)
MIN_ONNXRUNTIME_UNGATED = "1.24.3"  # before it, fc1 must have the rows of a gate
MIN_ONNXRUNTIME_ZERO_POINTS = "1.24.1"  # the inputs from the twelfth on
MIN_ONNXRUNTIME_ONE_BLOCK = (
    "1.31"  # before it, one block along H is taken for a scale a row, and zero points of one along I are misread
)
MIN_ONNXRUNTIME_INT8_ACTIVATIONS = "1.31"  # the attribute accuracy_level
MIN_ONNXRUNTIME_CUDA = "1.28"  # the attribute weights_prepacked


def refusal(layer: MoeLayer) -> str | None:
    """Why this lowering cannot express the layer, or None."""
    up = layer.matrix
    if not isinstance(up, QuantizedWeight):
        return "the QMoE operator takes quantized weights"
    if up.is_static:
        return "the QMoE operator takes no scales of activations"
    if layer.hidden_size % up.block_size:
        return f"the hidden size {layer.hidden_size} is not a multiple of the block size {up.block_size}"
    if layer.device == "cuda" and layer.element_type == "float32":
        return "CUDA's QMoE operator has no float32"
    if layer.device == "cuda" and up.block_size not in CUDA_BLOCKS:
        return (
            f"CUDA's QMoE operator is given blocks of {' or '.join(map(str, CUDA_BLOCKS))}, not "
            f"{up.block_size}; set quantize.block_size"
        )
    if layer.device == "cuda" and up.zero_points:
        return "CUDA's QMoE operator has no zero points"
    if up.bits == 8 and layer.activation_bits != 8:
        return "with 8-bit weights the operator reads activations in 8 bits"
    return activation_refusal(layer)


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes the layer correctly.

    Every minor release from 1.22 to 1.32 was tried on the CPU.
    """
    up, down = _quantized(layer.experts[0].up), _quantized(layer.experts[0].down)
    if up.bits == 4 and layer.activation_bits == 8:
        return MIN_ONNXRUNTIME_INT8_ACTIVATIONS
    if up.num_blocks == 1 or (down.zero_points and down.num_blocks == 1):
        return MIN_ONNXRUNTIME_ONE_BLOCK
    if layer.device == "cuda":
        return MIN_ONNXRUNTIME_CUDA
    if up.bits == 4 and (up.block_size > 32 or down.num_blocks == 1):
        return MIN_ONNXRUNTIME_WIDE_BLOCKS
    if not layer.is_gated:
        return MIN_ONNXRUNTIME_UNGATED
    return MIN_ONNXRUNTIME_ZERO_POINTS if up.zero_points else MIN_ONNXRUNTIME


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
    first, last = [expert.first for expert in layer.experts], [(expert.down,) for expert in layer.experts]
    rows = len(first[0]) * height

    def fc1() -> Quantized:
        return join([_interleave([_quantized(part).read() for part in parts], rows) for parts in first], torch.stack)

    def fc2() -> Quantized:
        return join([_quantized(part).read() for (part,) in last], torch.stack)

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

    fc1_codes, fc1_scales, fc1_zero_points = add("fc1", rows, width, fc1)
    fc1_bias = add_bias(graph, first, rows, f"{layer.name}.fc1.bias")
    fc2_codes, fc2_scales, fc2_zero_points = add("fc2", width, height, fc2)
    fc2_bias = add_bias(graph, last, width, f"{layer.name}.fc2.bias")
    attributes = {**operator_attributes(layer), "expert_weight_bits": bits, "block_size": block}
    if bits == 4 and layer.activation_bits == 8:
        attributes["accuracy_level"] = 4
    if layer.device == "cuda":
        attributes["weights_prepacked"] = 0
    inputs: list[ir.Value | None] = [x, logits, fc1_codes, fc1_scales, fc1_bias, fc2_codes, fc2_scales, fc2_bias]
    if down.zero_points:
        inputs += [None, None, None, fc1_zero_points, fc2_zero_points]
    elif fc2_bias is None:
        inputs.pop()
    return graph.widen(graph.op("QMoE", inputs, output, attributes, MICROSOFT))


def _quantized(linear: Linear) -> QuantizedWeight:
    assert isinstance(linear.weight, QuantizedWeight)
    return linear.weight


def _interleave(parts: Sequence[Quantized], rows: int) -> Quantized:
    """Rows in turns, padded with zeros up to `rows`."""

    def combine(tensors: list[torch.Tensor]) -> torch.Tensor:
        whole = interleave(tensors)
        return torch.cat([whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])])

    return join(list(parts), combine)
