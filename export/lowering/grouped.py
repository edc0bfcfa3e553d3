"""Tokens sorted by expert, and two products an expert.

Standard operators, any width, any provider.

1. Every pair of a token and one of its k experts is a row; rows are sorted by expert (`TopK` breaks ties by the lower
   index, so it sorts stably).
2. The sorted rows are split at the experts' counts, and each expert multiplies its own piece; an expert without tokens
   multiplies an empty matrix.
3. The activation of experts with a gate works on all rows at once; without a gate it is one node an expert, as there
   joining and splitting rows is no work that pays: a layer of BERT-base's shapes takes 3 % less time on 1,024 tokens.
4. Rows go back to their tokens by the inverse of the sort, and each token sums its k rows by weight.

All that depends on the number of experts are the two products of each, into which onnxruntime takes their biases, and
activations without a gate: 2 E + 21 nodes a layer, or 3 E + 19, where `unrolled` has 12 E + 5. A decode step pays for
nodes. A prefill pays for the copies that splitting and joining make, a few percent of the products.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dense2moe.export.gates.routes import add_routes
from dense2moe.export.lowering.layer import MoeInput, MoeLayer, add_hidden_shape
from dense2moe.export.nodes.activation import add_inner
from dense2moe.export.nodes.linear import add_linear, oldest_onnxruntime
from dense2moe.export.nodes.writer import GraphWriter, int64

NAME = "grouped"


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
        _sum_by_token(
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
    return add_hidden_shape(graph, _sum_by_token(graph, layer, tokens, weights, chosen), tokens, f"{layer.name}.output")


def _sum_by_token(
    graph: GraphWriter, layer: MoeLayer, tokens: ir.Value, weights: ir.Value, chosen: ir.Value
) -> ir.Value:
    """The layer's output [T, 1, H], summed over each token's experts.

    For tokens [T, H] that visit experts [T, k] with weights [T, k]; rows R = T * k.
    """
    name = layer.name
    k, num_experts = layer.gate.max_experts_per_token, layer.gate.num_experts
    if layer.gate.may_leave_free:
        chosen = _set_aside(graph, weights, chosen, num_experts, name)
    expert_R = graph.op("Reshape", [chosen, graph.constant("axis_last", int64(-1))], f"{name}.row_experts")
    num_rows = graph.shared("num_rows", lambda: graph.op("Shape", [expert_R], "num_rows"))
    _, order_R = graph.op_multi(
        "TopK", [expert_R, num_rows], [f"{name}.sorted_experts", f"{name}.order"], {"axis": 0, "largest": 0}
    )
    depth, bounds = graph.constant("num_experts", int64(num_experts)), graph.constant("off_on", int64(0, 1))
    is_expert_RE = graph.op("OneHot", [expert_R, depth, bounds], f"{name}.is_expert")
    counts = graph.op("ReduceSum", [is_expert_RE, graph.constant("zero", int64(0))], f"{name}.counts", {"keepdims": 0})

    if layer.gate.may_leave_free:
        visiting = [graph.constant("zero", int64(0)), graph.op("ReduceSum", [counts], f"{name}.num_visits")]
        row_R = graph.op("Slice", [order_R, *visiting], f"{name}.visiting_rows")
    else:
        row_R = order_R
    token_R = graph.op("Div", [row_R, graph.constant("rows_per_token", np.array(k, np.int64))], f"{name}.row_tokens")
    x_RH = graph.op("Gather", [tokens, token_R], f"{name}.rows")
    pieces = _split(graph, x_RH, counts, num_experts, f"{name}.input")
    first = [
        add_linear(graph, rows, expert.first, f"{name}.expert.{n}.{layer.first_name}", layer.activation_bits)
        for n, (rows, expert) in enumerate(zip(pieces, layer.experts, strict=True))
    ]
    inner = _activate(graph, layer, first, counts)
    down = [
        add_linear(graph, rows, expert.down, f"{name}.expert.{n}.down", layer.activation_bits)
        for n, (rows, expert) in enumerate(zip(inner, layer.experts, strict=True))
    ]
    if layer.gate.may_leave_free:
        down.append(_add_nothing(graph, layer, num_rows, visiting[1]))
    down_RH = graph.op("Concat", down, f"{name}.down", {"axis": 0})

    _, inverse_R = graph.op_multi(
        "TopK", [order_R, num_rows], [f"{name}.sorted_order", f"{name}.inverse"], {"axis": 0, "largest": 0}
    )
    y_RH = graph.op("Gather", [down_RH, inverse_R], f"{name}.row_outputs")
    y_TKH = graph.op(
        "Reshape",
        [graph.widen(y_RH), graph.constant("rows_by_token", int64(-1, k, layer.hidden_size))],
        f"{name}.outputs",
    )
    weights_T1K = graph.op("Unsqueeze", [weights, graph.constant("one", int64(1))], f"{name}.weight_rows")
    return graph.op("MatMul", [weights_T1K, y_TKH], f"{name}.sum")


def _set_aside(graph: GraphWriter, weights: ir.Value, chosen: ir.Value, num_experts: int, name: str) -> ir.Value:
    """Experts [T, k], where places of weight 0 name none.

    Their rows come last.
    """
    nothing = graph.constant("no_weight", np.array(0, np.float32))
    nobody = graph.constant("nobody", np.array(num_experts, np.int64))
    is_free = graph.op("Equal", [graph.widen(weights), nothing], f"{name}.is_free")
    return graph.op("Where", [is_free, nobody, chosen], f"{name}.visited")


def _add_nothing(graph: GraphWriter, layer: MoeLayer, num_rows: ir.Value, num_visits: ir.Value) -> ir.Value:
    """Rows of zeros [R - visits, H], of places left free."""
    name = layer.name
    missing = graph.op("Sub", [num_rows, num_visits], f"{name}.num_free")
    shape = graph.op(
        "Concat", [missing, graph.constant("width", int64(layer.hidden_size))], f"{name}.free_shape", {"axis": 0}
    )
    zeros = graph.op("ConstantOfShape", [shape], f"{name}.free_rows")
    return graph.narrow(zeros)


def _activate(graph: GraphWriter, layer: MoeLayer, first: list[ir.Value], counts: ir.Value) -> list[ir.Value]:
    """What each expert's last matrix reads."""
    name = layer.name
    if not layer.is_gated:
        return [
            add_inner(graph, rows, is_gated=False, prefix=f"{name}.expert.{n}", activation=layer.activation)
            for n, rows in enumerate(first)
        ]
    first_RN = graph.op("Concat", first, f"{name}.{layer.first_name}", {"axis": 0})
    inner_RI = add_inner(graph, first_RN, is_gated=True, prefix=name, activation=layer.activation)
    return _split(graph, inner_RI, counts, layer.gate.num_experts, f"{name}.inner")


def _split(graph: GraphWriter, rows: ir.Value, counts: ir.Value, num_experts: int, name: str) -> list[ir.Value]:
    """The rows of each expert."""
    return list(graph.op_multi("Split", [rows, counts], [f"{name}.{n}" for n in range(num_experts)], {"axis": 0}))
