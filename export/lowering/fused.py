"""Lowerings by operators that choose experts by themselves.

They are given the router's logits, or logits that encode routes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from dense2moe.export.gates.logits import add_own_logits, add_told_logits, is_the_operators
from dense2moe.export.gates.routes import add_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer, add_hidden_shape
from dense2moe.export.nodes.writer import GraphWriter

AddOperator = Callable[[GraphWriter, MoeLayer, ir.Value, ir.Value, str], ir.Value]
"""Writes the operator of a layer for x [..., H] and logits [T, E], its output under a name."""


def lower_logits(graph: GraphWriter, layer: MoeLayer, x: MoeInput, add_operator: AddOperator) -> ir.Value:
    """The layer's output [B, S, H], from router logits."""
    name = layer.name
    if not is_the_operators(layer.gate):
        routes = add_routes(graph, layer.gate, layer.selection_bias, x.router_logits, name)
        return add_hidden_shape(
            graph, lower_routes(graph, layer, x.tokens, *routes, add_operator), x.hidden, f"{name}.output"
        )
    if graph.element_type == "bfloat16":
        routes = add_routes(graph, layer.gate, layer.selection_bias, x.router_logits, name)
        logits, _ = add_told_logits(graph, layer.gate.num_experts, *routes, name)  # renormalized: their sum is one
    else:
        logits = add_own_logits(graph, x.router_logits, name)
    return add_operator(graph, layer, graph.narrow(x.hidden), logits, f"{name}.output")


def lower_routes(
    graph: GraphWriter,
    layer: MoeLayer,
    tokens: ir.Value,
    weights: ir.Value,
    chosen: ir.Value,
    add_operator: AddOperator,
) -> ir.Value:
    """The layer's output [T, H], from routes that are given.

    For tokens [T, H], and weights and numbers [T, K] of the experts that each visits.
    """
    logits, total_T1 = add_told_logits(graph, layer.gate.num_experts, weights, chosen, layer.name)
    mean_TH = add_operator(graph, layer, tokens, logits, f"{layer.name}.output_over_total")
    return graph.op("Mul", [mean_TH, total_T1], f"{layer.name}.output_weighted")
