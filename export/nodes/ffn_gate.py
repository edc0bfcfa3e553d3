"""The gate of a gated FFN: activations and their nodes."""

from __future__ import annotations

from typing import assert_never

import onnx_ir as ir

from dense2moe.export.coverage import Activation
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter


def add_gate(graph: GraphWriter, gate: ir.Value, up: ir.Value, prefix: str, activation: Activation) -> ir.Value:
    """The activation of `gate`, times `up`."""
    match activation:
        case "silu":
            # x * sigmoid(alpha * x)
            active = graph.op("QuickGelu", [gate], f"{prefix}.silu", {"alpha": 1.0}, MICROSOFT)
        case "gelu":
            active = graph.op("Gelu", [gate], f"{prefix}.gelu")
        case "gelu_pytorch_tanh":
            active = graph.op("Gelu", [gate], f"{prefix}.gelu", {"approximate": "tanh"})
        case _:
            assert_never(activation)
    return graph.op("Mul", [active, up], f"{prefix}.inner")
