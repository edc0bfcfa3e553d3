"""Routing in standard operators: from router logits to chosen experts and their weights, and back."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import onnx_ir as ir

from export.graph import GraphWriter, int64
from export.routing import Routing

_LEFT_OUT = -1e30  # finite, and far below the logarithm of any float32


def add_logits(graph: GraphWriter, num_experts: int, weights: ir.Value, chosen: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Router logits [T, E] whose renormalized softmax over the top k gives the chosen experts their weights, but for the sum of these [T, 1].

    They are the logarithms of the weights: so an operator that does the routing itself can be told one that it does not know.
    """
    total_T1 = graph.op("ReduceSum", [weights, graph.constant("axis_last", int64(-1))], f"{name}.total", {"keepdims": 1})
    one_hot_depth, left_out = graph.constant("num_experts", int64(num_experts)), graph.constant("left_out", np.array(_LEFT_OUT, np.float32))
    num_tokens = graph.op("Slice", [graph.op("Shape", [weights], f"{name}.weights_shape"), *_bounds(graph)], f"{name}.num_tokens")
    shape = graph.op("Concat", [num_tokens, one_hot_depth], f"{name}.logits_shape", {"axis": 0})
    nobody_TE = graph.op("Expand", [left_out, shape], f"{name}.nobody")
    logarithms_TK = graph.op("Log", [weights], f"{name}.logarithms")
    return graph.op("ScatterElements", [nobody_TE, chosen, logarithms_TK], f"{name}.logits", {"axis": -1}), total_T1


def _bounds(graph: GraphWriter) -> tuple[ir.Value, ir.Value]:
    return graph.constant("zero", int64(0)), graph.constant("one", int64(1))


def add_top_k(graph: GraphWriter, routing: Routing, router_logits: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """router_logits [T, E] to the weights [T, k] of the experts that each token visits, and their numbers int64 [T, k].

    The softmax keeps the order of its logits, so where the chosen weights are renormalized it is taken of the chosen logits alone; it is the same
    function, and two logits that the softmax would round to one score stay apart.
    """
    last = graph.constant("axis_last", int64(-1))
    top_k = graph.constant("num_experts_per_tok", int64(routing.num_experts_per_tok))
    names = [f"{name}.top_k", f"{name}.chosen"]
    match routing.score:
        case "softmax" if routing.renormalize:
            logits_TK, chosen_TK = graph.op_multi("TopK", [router_logits, top_k], names, {"axis": -1})
            weights_TK = graph.op("Softmax", [logits_TK], f"{name}.weights", {"axis": -1})
        case "softmax":
            scores_TE = graph.op("Softmax", [router_logits], f"{name}.scores", {"axis": -1})
            weights_TK, chosen_TK = graph.op_multi("TopK", [scores_TE, top_k], names, {"axis": -1})
        case "sigmoid":
            scores_TE = graph.op("Sigmoid", [router_logits], f"{name}.scores")
            weights_TK, chosen_TK = graph.op_multi("TopK", [scores_TE, top_k], names, {"axis": -1})
            if routing.renormalize:
                total = graph.op("ReduceSum", [weights_TK, last], f"{name}.total", {"keepdims": 1})
                weights_TK = graph.op("Div", [weights_TK, total], f"{name}.weights")
        case _:
            assert_never(routing.score)
    if routing.scale != 1.0:
        factor = graph.constant("routing_scale", np.array(routing.scale, np.float32))
        weights_TK = graph.op("Mul", [weights_TK, factor], f"{name}.scaled_weights")
    return weights_TK, chosen_TK
