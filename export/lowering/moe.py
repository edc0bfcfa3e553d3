"""The `MoE` operator of onnxruntime: float experts, one node a layer.

fc1 [E, 2I, H] holds gate and up rows interleaved (swiglu_fusion 1), fc2 [E, H, I]; alpha 1 and beta 0 make its SwiGLU
the plain SiLU gate. The operator takes raw router logits and does softmax, top-k and renormalization itself; what
other gates say it is told (`dense2moe.export.gates.logits`). `normalize_routing_weights` is always 1: with 0 it
computes wrong values before onnxruntime 1.32 when it stands between other nodes, and `QMoE` ignores it.

CUDA's kernel (contrib_ops/cuda/moe of onnxruntime 1.31) computes in float32, float16 or bfloat16, and wants rows of 16
bytes. It honours the attributes of a plain SwiGLU from 1.28 on. By construction: no CUDA device was at hand.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from dense2moe.export.lowering.fused import lower_logits, lower_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter
from dense2moe.export.quantization.twin import FloatWeight
from dense2moe.upcycle.gates.gate import Gate

NAME = "moe"
MIN_ONNXRUNTIME = "1.23.1"  # 1.23.0 has no kernel for the CPU
MIN_ONNXRUNTIME_CUDA = (
    "1.28"  # before it, CUDA takes the constants of GPT-OSS for its SwiGLU, whatever the attributes say
)
_CUDA_WIDTHS = 8  # 16 bytes of float16 or bfloat16


def refusal(layer: MoeLayer) -> str | None:
    """Why this lowering cannot express the layer, or None."""
    if layer.quantized:
        return "the MoE operator takes float weights"
    if layer.device == "cuda" and (layer.hidden_size % _CUDA_WIDTHS or layer.intermediate_size % _CUDA_WIDTHS):
        return (
            f"CUDA's MoE operator takes widths that are multiples of {_CUDA_WIDTHS}, not {layer.hidden_size} and "
            f"{layer.intermediate_size}"
        )
    return activation_refusal(layer)


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes the layer correctly."""
    return MIN_ONNXRUNTIME_CUDA if layer.device == "cuda" else MIN_ONNXRUNTIME


def activation_refusal(layer: MoeLayer) -> str | None:
    """Why the operators' FFN gate cannot express the layer's, or None."""
    return None if layer.activation == "silu" else f"the operator's gate is SiLU, not {layer.activation}"


def swiglu_attributes(gate: Gate) -> dict[str, Any]:
    """Attributes that `MoE` and `QMoE` share."""
    return {
        "k": gate.max_experts_per_token,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }


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


def add_operator(graph: GraphWriter, layer: MoeLayer, x: ir.Value, logits: ir.Value, name: str) -> ir.Value:
    """The layer's output in float32, by the operator and its logits.

    Of the shape of x [..., H]; the logits [T, E] are the router's, or encode routes.

    Both are of the graph's element type.
    """
    num_experts, height, width = layer.gate.num_experts, layer.intermediate_size, layer.hidden_size

    def fc1() -> torch.Tensor:
        return torch.stack([torch.stack([_read(e.gate), _read(e.up)], dim=1).flatten(0, 1) for e in layer.experts])

    def fc2() -> torch.Tensor:
        return torch.stack([_read(e.down) for e in layer.experts])

    fc1_value = graph.float_weight(f"{layer.name}.fc1", (num_experts, 2 * height, width), fc1)
    fc2_value = graph.float_weight(f"{layer.name}.fc2", (num_experts, width, height), fc2)
    inputs = [x, logits, fc1_value, None, fc2_value]
    return graph.widen(graph.op("MoE", inputs, name, swiglu_attributes(layer.gate), MICROSOFT))


def _read(weight: object) -> torch.Tensor:
    assert isinstance(weight, FloatWeight)
    return weight.read()
