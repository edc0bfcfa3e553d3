"""Routes as nodes: chosen experts and their weights, from router logits.

1. Scores, by `scores`.
2. The choice, by `choice`: of the scores, or of scores plus the selection bias.
3. The chosen scores, divided by their sum where the gate renormalizes, and times its scale.

The softmax keeps the order of its logits, so where nothing but the chosen weights and their sum is asked for it is
taken of the chosen logits alone; it is the same function, and two logits that it would round to one score stay apart.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dense2moe.export import names
from dense2moe.export.gates.choice import add_choice, add_visited
from dense2moe.export.gates.scores import add_scores
from dense2moe.export.nodes.writer import GraphWriter, int64
from dense2moe.export.quantization.twin import FloatWeight
from dense2moe.upcycle.gates.gate import Gate

SMALLEST_TOTAL = 1e-20
"""Added to the sum of sigmoids, as transformers and `dense2moe.upcycle.gates.routes` do it: all may be zero."""


def add_routes(
    graph: GraphWriter, gate: Gate, bias: FloatWeight | None, router_logits: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    """Weights [T, K] of each token's experts, and their numbers, int64.

    Both tensors are [T, K]. From router logits [T, E] and the selection bias [1, E] of a gate that has one, all
    float32.
    """
    assert gate.selection_bias == (bias is not None), "a gate is given its selection bias, if it has one"
    if gate.score == "softmax" and gate.renormalize and bias is None and not gate.may_leave_free:
        logits_TK, chosen_TK = add_choice(graph, gate.choice, router_logits, name)
        weights_TK = graph.op("Softmax", [logits_TK], f"{name}.weights", {"axis": -1})
    else:
        scores_TE = add_scores(graph, gate, router_logits, name)
        if gate.score == "relu" and bias is None:  # by logits, of which no two are zero
            selection_TE = router_logits
            best_TK, chosen_TK = add_choice(graph, gate.choice, router_logits, name)
            weights_TK = graph.op("Relu", [best_TK], f"{name}.chosen_scores")
        elif bias is None:
            best_TK, chosen_TK = add_choice(graph, gate.choice, scores_TE, name)
            weights_TK, selection_TE = best_TK, scores_TE
        else:
            bias_1E = graph.weight(f"{name}.selection_bias", ir.DataType.FLOAT, bias.shape, bias.read)
            selection_TE = graph.op("Add", [scores_TE, bias_1E], names.selection_scores(name))
            best_TK, chosen_TK = add_choice(graph, gate.choice, selection_TE, name)
            weights_TK = graph.op("GatherElements", [scores_TE, chosen_TK], f"{name}.chosen_scores", {"axis": 1})
        if (visited_TK := add_visited(graph, gate.choice, best_TK, selection_TE, name)) is not None:
            nothing = graph.constant("no_weight", np.array(0, np.float32))
            weights_TK = graph.op("Where", [visited_TK, weights_TK, nothing], f"{name}.visited_scores")
        if gate.renormalize:
            weights_TK = _renormalize(graph, gate, weights_TK, name)
    if gate.scale != 1.0:
        factor = graph.constant("routing_scale", np.array(gate.scale, np.float32))
        weights_TK = graph.op("Mul", [weights_TK, factor], f"{name}.scaled_weights")
    return weights_TK, chosen_TK


def _renormalize(graph: GraphWriter, gate: Gate, scores: ir.Value, name: str) -> ir.Value:
    last = graph.constant("axis_last", int64(-1))
    if gate.score == "relu":  # where all positive parts are zero, the first expert has the whole weight
        floor = np.where(np.arange(gate.max_experts_per_token) == 0, SMALLEST_TOTAL, 0).astype(np.float32)
        scores = graph.op("Max", [scores, graph.constant("least_scores", floor)], f"{name}.raised_scores")
    total_T1 = graph.op("ReduceSum", [scores, last], f"{name}.chosen_sum", {"keepdims": 1})
    if gate.score == "sigmoid":  # the largest of a softmax is never small
        least = graph.constant("smallest_total", np.array(SMALLEST_TOTAL, np.float32))
        total_T1 = graph.op("Add", [total_T1, least], f"{name}.chosen_sum_above_zero")
    return graph.op("Div", [scores, total_T1], f"{name}.weights")
