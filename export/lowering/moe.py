"""The `MoE` operator of onnxruntime: float experts, one node a layer.

fc1 [E, 2I, H] holds gate and up rows interleaved (swiglu_fusion 1), fc2 [E, H, I]; alpha 1 and beta 0 make its SwiGLU
the plain SiLU gate, alpha 1.702 a quick-GELU gate. Without a gate fc1 is [E, I, H], and the operator knows ReLU, SiLU
and the tanh form of GELU. Biases [E, 2I] or [E, I] and [E, H] are inputs 3 and 5. The operator takes raw router logits
and does softmax, top-k and renormalization itself; what other gates say it is told (`dense2moe.export.gates.logits`).
`normalize_routing_weights` is always 1: with 0 it computes wrong values before onnxruntime 1.32 when it stands between
other nodes, and `QMoE` ignores it.

CUDA's kernel (contrib_ops/cuda/moe of onnxruntime 1.31) computes in float32, float16 or bfloat16, and wants rows of 16
bytes. It honours the attributes of a plain SwiGLU from 1.28 on. By construction: no CUDA device was at hand. What its
GELU is was not found out, so experts without a gate are left to standard operators there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from dense2moe.export.coverage import Activation
from dense2moe.export.lowering.fused import lower_logits, lower_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer
from dense2moe.export.nodes.activation import QUICK_GELU_ALPHA
from dense2moe.export.nodes.linear import Linear
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter
from dense2moe.export.quantization.twin import FloatWeight

NAME = "moe"
MIN_ONNXRUNTIME = "1.23.1"  # 1.23.0 has no kernel for the CPU
MIN_ONNXRUNTIME_CUDA = (
    "1.28"  # before it, CUDA takes the constants of GPT-OSS for its SwiGLU, whatever the attributes say
)
_CUDA_WIDTHS = 8  # 16 bytes of float16 or bfloat16
_GATE_ALPHAS: Mapping[Activation, float] = {"silu": 1.0, "quick_gelu": QUICK_GELU_ALPHA}
"""What makes a gate of the operators' SwiGLU, g * sigmoid(alpha * g) * u."""
_TYPES: Mapping[Activation, str] = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}
"""The operators' activations without a gate."""


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
    """Why the operators' activations cannot express the layer's, or None."""
    if layer.is_gated:
        known = layer.activation in _GATE_ALPHAS
        return None if known else f"the operator's gate is SiLU or quick-GELU, not {layer.activation}"
    if layer.device == "cuda":
        return "CUDA's operator was looked into for gated experts alone"
    if layer.activation == "gelu":
        return "the operator's GELU is the tanh form, and this one is the erf form; 'grouped' computes it"
    known = layer.activation in _TYPES
    return None if known else f"the operator knows {', '.join(_TYPES)}, not {layer.activation}; 'grouped' computes it"


def operator_attributes(layer: MoeLayer) -> dict[str, Any]:
    """Attributes that `MoE` and `QMoE` share."""
    inside: dict[str, Any] = (
        {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": _GATE_ALPHAS[layer.activation],
            "activation_beta": 0.0,
        }
        if layer.is_gated
        else {"activation_type": _TYPES[layer.activation]}
    )
    return {"k": layer.gate.max_experts_per_token, **inside, "normalize_routing_weights": 1}


def add_bias(graph: GraphWriter, linears: Sequence[Sequence[Linear]], rows: int, name: str) -> ir.Value | None:
    """Biases of the operators, [E, rows], or None without biases.

    `linears` are the matrices of each expert whose rows are interleaved. Rows that pad them have a bias of zero.
    """
    biases = [[linear.bias for linear in own if linear.bias is not None] for own in linears]
    if not any(biases):
        return None
    assert [len(own) for own in biases] == [len(own) for own in linears], f"{name}: only some matrices have a bias"

    def read() -> torch.Tensor:
        whole = torch.stack([interleave([bias.read() for bias in own]) for own in biases])
        return torch.nn.functional.pad(whole, (0, rows - whole.shape[1]))

    return graph.float_weight(name, (len(linears), rows), read)


def interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows in turns: g0, u0, g1, u1, … of gate and up."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)


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
    first, last = [expert.first for expert in layer.experts], [(expert.down,) for expert in layer.experts]
    rows = len(first[0]) * height

    def fc1() -> torch.Tensor:
        return torch.stack([interleave([_read(part) for part in parts]) for parts in first])

    def fc2() -> torch.Tensor:
        return torch.stack([_read(part) for (part,) in last])

    fc1_value = graph.float_weight(f"{layer.name}.fc1", (num_experts, rows, width), fc1)
    fc1_bias = add_bias(graph, first, rows, f"{layer.name}.fc1.bias")
    fc2_value = graph.float_weight(f"{layer.name}.fc2", (num_experts, width, height), fc2)
    fc2_bias = add_bias(graph, last, width, f"{layer.name}.fc2.bias")
    inputs = [x, logits, fc1_value, fc1_bias, fc2_value, *([] if fc2_bias is None else [fc2_bias])]
    return graph.widen(graph.op("MoE", inputs, name, operator_attributes(layer), MICROSOFT))


def _read(linear: Linear) -> torch.Tensor:
    assert isinstance(linear.weight, FloatWeight)
    return linear.weight.read()
