"""Routing in standard operators: from router logits to chosen experts and their weights, and back."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import onnx_ir as ir

from dense2moe.export import names
from dense2moe.export.lowering.layer import MoeLayer
from dense2moe.export.nodes.writer import GraphWriter, int64

_LEFT_OUT = -1e30  # finite, and far below the logarithm of any float32


def add_logits(
    graph: GraphWriter, num_experts: int, weights: ir.Value, chosen: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    """Router logits [T, E] whose renormalized softmax over the top k gives the chosen experts their weights.

    But for the sum of these [T, 1]. They are the logarithms of the weights: so an operator that does the routing itself
    can be told one that it does not know.
    """
    total_T1 = graph.op(
        "ReduceSum", [weights, graph.constant("axis_last", int64(-1))], f"{name}.total", {"keepdims": 1}
    )
    one_hot_depth, left_out = (
        graph.constant("num_experts", int64(num_experts)),
        graph.constant("left_out", np.array(_LEFT_OUT, np.float32)),
    )
    num_tokens = graph.op(
        "Slice", [graph.op("Shape", [weights], f"{name}.weights_shape"), *_bounds(graph)], f"{name}.num_tokens"
    )
    shape = graph.op("Concat", [num_tokens, one_hot_depth], f"{name}.logits_shape", {"axis": 0})
    nobody_TE = graph.op("Expand", [left_out, shape], f"{name}.nobody")
    logarithms_TK = graph.op("Log", [weights], f"{name}.logarithms")
    return graph.op("ScatterElements", [nobody_TE, chosen, logarithms_TK], f"{name}.logits", {"axis": -1}), total_T1


def _bounds(graph: GraphWriter) -> tuple[ir.Value, ir.Value]:
    return graph.constant("zero", int64(0)), graph.constant("one", int64(1))


def add_operator_logits(graph: GraphWriter, layer: MoeLayer, router_logits: ir.Value) -> ir.Value:
    """The router logits for an operator that takes them in the graph's element type and does softmax and top-k itself.

    In float16 each token's largest logit is taken off first, which changes no softmax: what competes for the last place
    among the k is then small, and float16 is fine near zero. A logit of 20 would lie between neighbours that are 0.016
    apart. bfloat16 is fine nowhere, with eight bits: there experts are chosen in float32, and the operator is told the
    logarithms of their weights.
    """
    name = layer.name
    if graph.element_type == "float32":
        return router_logits
    if graph.element_type == "bfloat16":
        # renormalized: their sum is one
        logits, _ = add_logits(graph, layer.routing.num_experts, *add_top_k(graph, layer, router_logits), name)
        return graph.narrow(logits)
    largest = graph.op(
        "ReduceMax", [router_logits, graph.constant("axis_last", int64(-1))], f"{name}.largest_logit", {"keepdims": 1}
    )
    return graph.narrow(graph.op("Sub", [router_logits, largest], f"{name}.logits_below_largest"))


def add_top_k(graph: GraphWriter, layer: MoeLayer, router_logits: ir.Value) -> tuple[ir.Value, ir.Value]:
    """router_logits [T, E] to the weights [T, k] of the experts that each token visits, and their numbers int64 [T, k].

    The softmax keeps the order of its logits, so where nothing but the chosen weights and their sum is asked for it is
    taken of the chosen logits alone; it is the same function, and two logits that the softmax would round to one score
    stay apart.
    """
    name, routing = layer.name, layer.routing
    if routing.score == "softmax" and routing.renormalize and layer.selection_bias is None:
        logits_TK, chosen_TK = _top_k(graph, layer, router_logits)
        weights_TK = graph.op("Softmax", [logits_TK], f"{name}.weights", {"axis": -1})
    else:
        scores_TE = _scores(graph, layer, router_logits)
        if layer.selection_bias is None:
            weights_TK, chosen_TK = _top_k(graph, layer, scores_TE)
        else:
            bias = layer.selection_bias
            bias_1E = graph.weight(f"{name}.selection_bias", ir.DataType.FLOAT, bias.shape, bias.read)
            _, chosen_TK = _top_k(graph, layer, graph.op("Add", [scores_TE, bias_1E], names.selection_scores(name)))
            weights_TK = graph.op("GatherElements", [scores_TE, chosen_TK], f"{name}.chosen_scores", {"axis": 1})
        if routing.renormalize:
            total = graph.op(
                "ReduceSum", [weights_TK, graph.constant("axis_last", int64(-1))], f"{name}.total", {"keepdims": 1}
            )
            weights_TK = graph.op("Div", [weights_TK, total], f"{name}.weights")
    if routing.scale != 1.0:
        factor = graph.constant("routing_scale", np.array(routing.scale, np.float32))
        weights_TK = graph.op("Mul", [weights_TK, factor], f"{name}.scaled_weights")
    return weights_TK, chosen_TK


def _scores(graph: GraphWriter, layer: MoeLayer, router_logits: ir.Value) -> ir.Value:
    match layer.routing.score:
        case "softmax":
            return graph.op("Softmax", [router_logits], f"{layer.name}.scores", {"axis": -1})
        case "sigmoid":
            return graph.op("Sigmoid", [router_logits], f"{layer.name}.scores")
        case _:
            assert_never(layer.routing.score)


def _top_k(graph: GraphWriter, layer: MoeLayer, values: ir.Value) -> tuple[ir.Value, ir.Value]:
    top_k = graph.constant("num_experts_per_tok", int64(layer.routing.max_experts_per_token))
    values_TK, chosen_TK = graph.op_multi(
        "TopK", [values, top_k], [f"{layer.name}.top_k", f"{layer.name}.chosen"], {"axis": -1}
    )
    return values_TK, chosen_TK
