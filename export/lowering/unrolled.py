"""A subgraph for each expert: standard operators, any width and provider.

Each expert gathers its tokens, computes them by ordinary matrix products (float or `MatMulNBits`) and adds the weighted
result into place; an expert without tokens multiplies empty matrices.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dense2moe.export.gates.routes import add_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer, add_hidden_shape
from dense2moe.export.nodes.activation import add_inner
from dense2moe.export.nodes.linear import add_linear, oldest_onnxruntime
from dense2moe.export.nodes.writer import GraphWriter, int64

NAME = "unrolled"


def refusal(_: MoeLayer) -> str | None:
    """None: this lowering expresses every layer."""
    return None


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes the layer correctly, given its products.

    No tokens at all need 1.31, for `TopK`.
    """
    return oldest_onnxruntime(layer.matrix)


def lower(graph: GraphWriter, layer: MoeLayer, x: MoeInput) -> ir.Value:
    """The layer's output [B, S, H]."""
    return add_hidden_shape(
        graph,
        lower_chosen(
            graph, layer, x.tokens, *add_routes(graph, layer.gate, layer.selection_bias, x.router_logits, layer.name)
        ),
        x.hidden,
        f"{layer.name}.output",
    )


def lower_chosen(
    graph: GraphWriter, layer: MoeLayer, tokens: ir.Value, weights: ir.Value, chosen: ir.Value
) -> ir.Value:
    """The layer's output [T, H], from experts chosen outside.

    For tokens [T, H], and experts with their weights [T, k].
    """
    name = layer.name
    last = graph.constant("axis_last", int64(-1))
    tokens_shape = graph.shared("tokens_shape", lambda: graph.op("Shape", [tokens], "tokens_shape"))
    sum_TH = graph.shared("no_tokens_yet", lambda: graph.op("ConstantOfShape", [tokens_shape], "no_tokens_yet"))
    for number, expert in enumerate(layer.experts):
        own = f"{name}.expert.{number}"
        is_chosen = graph.op(
            "Equal", [chosen, graph.constant(f"expert_{number}", np.array(number, np.int64))], f"{own}.is_chosen"
        )
        pairs = graph.op("NonZero", [is_chosen], f"{own}.pairs")
        pairs_N2 = graph.op("Transpose", [pairs], f"{own}.pairs_t", {"perm": [1, 0]})
        weight_N = graph.op("GatherND", [weights, pairs_N2], f"{own}.weight")
        weight_N1 = graph.op("Unsqueeze", [weight_N, last], f"{own}.weight_column")
        token_N1, _ = graph.op_multi(
            "Split", [pairs_N2], [f"{own}.token", f"{own}.slot"], {"axis": 1, "num_outputs": 2}
        )
        x_NH = graph.op("GatherND", [tokens, token_N1], f"{own}.input")
        first = add_linear(graph, x_NH, expert.first, f"{own}.{layer.first_name}", layer.activation_bits)
        inner_NI = add_inner(graph, first, layer.is_gated, own, layer.activation)
        down_NH = add_linear(graph, inner_NI, expert.down, f"{own}.down", layer.activation_bits)
        weighted_NH = graph.op("Mul", [graph.widen(down_NH), weight_N1], f"{own}.weighted")
        sum_TH = graph.op("ScatterND", [sum_TH, token_N1, weighted_NH], f"{own}.sum", {"reduction": "add"})
    return sum_TH
