"""What an FFN's last matrix reads: activations and gates as nodes."""

from __future__ import annotations

from typing import assert_never

import onnx_ir as ir

from dense2moe.export.coverage import Activation
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter

QUICK_GELU_ALPHA = 1.702
"""Of quick-GELU, which is x * sigmoid(alpha * x); SiLU is the same with 1."""


def add_inner(graph: GraphWriter, first: ir.Value, is_gated: bool, prefix: str, activation: Activation) -> ir.Value:
    """What an FFN's last matrix reads, from what its first ones gave.

    Gated, `first` is [..., 2 I], gate before up, and the inner value is the activation of gate, times up. Else it is
    [..., I], and the inner value is its activation.
    """
    if not is_gated:
        return _add_activation(graph, first, prefix, activation)
    gate, up = graph.op_multi("Split", [first], [f"{prefix}.gate", f"{prefix}.up"], {"axis": -1, "num_outputs": 2})
    return graph.op("Mul", [_add_activation(graph, gate, prefix, activation), up], f"{prefix}.inner")


def _add_activation(graph: GraphWriter, x: ir.Value, prefix: str, activation: Activation) -> ir.Value:
    match activation:
        case "silu":
            return graph.op("QuickGelu", [x], f"{prefix}.silu", {"alpha": 1.0}, MICROSOFT)
        case "quick_gelu":
            return graph.op("QuickGelu", [x], f"{prefix}.quick_gelu", {"alpha": QUICK_GELU_ALPHA}, MICROSOFT)
        case "gelu":
            return graph.op("Gelu", [x], f"{prefix}.gelu")
        case "gelu_tanh":
            return graph.op("Gelu", [x], f"{prefix}.gelu", {"approximate": "tanh"})
        case "relu":
            return graph.op("Relu", [x], f"{prefix}.relu")
        case "relu2":
            positive = graph.op("Relu", [x], f"{prefix}.relu")
            return graph.op("Mul", [positive, positive], f"{prefix}.relu_squared")
        case "sigmoid":
            return graph.op("Sigmoid", [x], f"{prefix}.sigmoid")
        case "tanh":
            return graph.op("Tanh", [x], f"{prefix}.tanh")
        case _:
            assert_never(activation)
