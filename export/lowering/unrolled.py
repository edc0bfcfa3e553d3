"""A subgraph an expert: standard operators, any width, any provider.

Each expert gathers its tokens, computes them by ordinary matrix products (float or `MatMulNBits`) and adds the weighted result into place;
an expert without tokens multiplies empty matrices.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.gating import add_gate
from export.graph import GraphWriter, int64
from export.linear import add_linear
from export.lowering.layer import MoeLayer
from export.lowering.top_k import add_top_k

NAME = "unrolled"
MIN_ONNXRUNTIME = "1.20"


def refusal(_: MoeLayer) -> str | None:
    """Nothing is refused."""
    return None


def lower(graph: GraphWriter, layer: MoeLayer, hidden: ir.Value, router_logits: ir.Value) -> ir.Value:
    """hidden [B, S, H] and router_logits [T = B * S, E] to the layer's output [B, S, H]."""
    return lower_chosen(graph, layer, hidden, *add_top_k(graph, layer.routing, router_logits, layer.name))


def lower_chosen(graph: GraphWriter, layer: MoeLayer, hidden: ir.Value, weights: ir.Value, chosen: ir.Value) -> ir.Value:
    """The same for experts that are chosen, with their weights."""
    name = layer.name
    last = graph.constant("axis_last", int64(-1))
    x_TH = graph.op("Reshape", [hidden, graph.constant("flat_hidden", int64(-1, layer.hidden_size))], f"{name}.tokens")
    sum_TH = graph.op("ConstantOfShape", [graph.op("Shape", [x_TH], f"{name}.shape")], f"{name}.zeros")
    for number, expert in enumerate(layer.experts):
        own = f"{name}.expert.{number}"
        is_chosen = graph.op("Equal", [chosen, graph.constant(f"expert_{number}", np.array(number, np.int64))], f"{own}.is_chosen")
        pairs = graph.op("NonZero", [is_chosen], f"{own}.pairs")
        pairs_N2 = graph.op("Transpose", [pairs], f"{own}.pairs_t", {"perm": [1, 0]})
        weight_N = graph.op("GatherND", [weights, pairs_N2], f"{own}.weight")
        weight_N1 = graph.op("Unsqueeze", [weight_N, last], f"{own}.weight_column")
        token_N1, _ = graph.op_multi("Split", [pairs_N2], [f"{own}.token", f"{own}.slot"], {"axis": 1, "num_outputs": 2})
        x_NH = graph.op("GatherND", [x_TH, token_N1], f"{own}.input")
        both_N2I = add_linear(graph, x_NH, (expert.gate, expert.up), f"{own}.gate_up", layer.activation_bits)
        gate_NI, up_NI = graph.op_multi("Split", [both_N2I], [f"{own}.gate", f"{own}.up"], {"axis": -1, "num_outputs": 2})
        inner_NI = add_gate(graph, gate_NI, up_NI, own, layer.activation)
        down_NH = add_linear(graph, inner_NI, expert.down, f"{own}.down", layer.activation_bits)
        weighted_NH = graph.op("Mul", [down_NH, weight_N1], f"{own}.weighted")
        sum_TH = graph.op("ScatterND", [sum_TH, token_N1, weighted_NH], f"{own}.sum", {"reduction": "add"})
    full_shape = graph.op("Shape", [hidden], f"{name}.full_shape")
    return graph.op("Reshape", [sum_TH, full_shape], f"{name}.output", {"allowzero": 1})  # a length of zero is no wish to copy a dimension
