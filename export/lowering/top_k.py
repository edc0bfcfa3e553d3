"""Routing in standard operators: the chosen experts of every token, and their weights."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import onnx_ir as ir

from export.graph import GraphWriter, int64
from export.routing import Routing


def add_operator_logits(graph: GraphWriter, router_logits: ir.Value, name: str) -> ir.Value:
    """The router logits for an operator that takes them in the graph's element type and does softmax and top-k itself.

    In float16 each token's largest logit is taken off first, which changes no softmax: what competes for the last place among the k is then small,
    and float16 is fine near zero. A logit of 20 would lie between neighbours that are 0.016 apart.
    """
    if graph.element_type == "float32":
        return router_logits
    largest = graph.op("ReduceMax", [router_logits, graph.constant("axis_last", int64(-1))], f"{name}.largest_logit", {"keepdims": 1})
    return graph.narrow(graph.op("Sub", [router_logits, largest], f"{name}.logits_below_largest"))


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
