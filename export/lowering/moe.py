"""The `MoE` operator of onnxruntime: float experts, one node a layer.

fc1 [E, 2I, H] holds gate and up rows interleaved (swiglu_fusion 1), fc2 [E, H, I]; alpha 1 and beta 0 make its SwiGLU
the plain SiLU gate. The operator takes raw router logits and does softmax, top-k and renormalization itself; in a
float16 graph it takes them rounded to float16, their largest at zero, and in a bfloat16 one it is told which experts
are chosen.

CUDA's kernel (contrib_ops/cuda/moe of onnxruntime 1.31) computes in float32, float16 or bfloat16, and wants rows of 16
bytes. It honours the attributes of a plain SwiGLU from 1.28 on. By construction: no CUDA device was at hand.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from dense2moe.export.gates.top_k import add_operator_logits
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
    return routing_refusal(layer) or activation_refusal(layer)


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes the layer rightly."""
    return MIN_ONNXRUNTIME_CUDA if layer.device == "cuda" else MIN_ONNXRUNTIME


def routing_refusal(layer: MoeLayer) -> str | None:
    """Why the operators' built-in routing cannot express the layer's, or None.

    Without renormalization the operator computes wrong values before onnxruntime 1.32 when it stands between other
    nodes.
    """
    routing = layer.routing
    if routing.score != "softmax":
        return f"the operator scores by softmax, not {routing.score}"
    if layer.selection_bias is not None:
        return "the operator has no bias for the choice of experts"
    if not routing.renormalize:
        return "normalize_routing_weights=0 computes wrong values before onnxruntime 1.32"
    if routing.scale != 1.0:
        return "the operator has no factor on the weights"
    return None


def activation_refusal(layer: MoeLayer) -> str | None:
    """Why the operators' gate cannot express the layer's, or None."""
    return None if layer.activation == "silu" else f"the operator's gate is SiLU, not {layer.activation}"


def swiglu_attributes(routing: Gate) -> dict[str, Any]:
    """Attributes that `MoE` and `QMoE` share."""
    return {
        "k": routing.max_experts_per_token,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }


def lower(graph: GraphWriter, layer: MoeLayer, x: MoeInput) -> ir.Value:
    """The layer's output [B, S, H]."""
    num_experts, height, width = layer.routing.num_experts, layer.intermediate_size, layer.hidden_size

    def fc1() -> torch.Tensor:
        return torch.stack([torch.stack([_read(e.gate), _read(e.up)], dim=1).flatten(0, 1) for e in layer.experts])

    def fc2() -> torch.Tensor:
        return torch.stack([_read(e.down) for e in layer.experts])

    fc1_value = graph.float_weight(f"{layer.name}.fc1", (num_experts, 2 * height, width), fc1)
    fc2_value = graph.float_weight(f"{layer.name}.fc2", (num_experts, width, height), fc2)
    inputs = [graph.narrow(x.hidden), add_operator_logits(graph, layer, x.router_logits), fc1_value, None, fc2_value]
    return graph.widen(graph.op("MoE", inputs, f"{layer.name}.output", swiglu_attributes(layer.routing), MICROSOFT))


def _read(weight: object) -> torch.Tensor:
    assert isinstance(weight, FloatWeight)
    return weight.read()
