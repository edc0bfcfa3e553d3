"""The choice of experts by selection scores, as nodes."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import onnx_ir as ir

from dense2moe.export.nodes.writer import GraphWriter, int64
from dense2moe.upcycle.gates.gate import Above, Choice, Mass, Near, TopK, most_experts


def add_choice(graph: GraphWriter, choice: Choice, scores: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """The best experts of each token, and their selection scores.

    Returns the selection scores [T, K] first, then the experts' numbers, int64 [T, K], best first. Which of them a
    token visits is told by `add_visited`.
    """
    count = graph.constant("num_experts_per_tok", int64(most_experts(choice)))
    values_TK, chosen_TK = graph.op_multi("TopK", [scores, count], [f"{name}.top_k", f"{name}.chosen"], {"axis": -1})
    return values_TK, chosen_TK


def add_visited(graph: GraphWriter, choice: Choice, best: ir.Value, scores: ir.Value, name: str) -> ir.Value | None:
    """Which of its best experts a token visits, bool [T, K].

    None where it visits all of them. `best` has their scores [T, K], `scores` those of all experts [T, E].
    """
    last = graph.constant("axis_last", int64(-1))
    match choice:
        case TopK():
            return None
        case Above(level, most):
            above = graph.op("Greater", [best, _number(graph, "gate_level", level)], f"{name}.is_above")
            first = graph.constant("is_first", np.arange(most) == 0)
            return graph.op("Or", [above, first], f"{name}.is_visited")
        case Mass(share):
            total = graph.op("ReduceSum", [scores, last], f"{name}.score_total", {"keepdims": 1})
            wanted = graph.op("Mul", [total, _number(graph, "gate_share", share)], f"{name}.score_wanted")
            axis = graph.constant("axis_of_experts", np.array(-1, np.int64))
            before = graph.op("CumSum", [best, axis], f"{name}.score_before", {"exclusive": 1})
            return graph.op("Less", [before, wanted], f"{name}.is_visited")
        case Near(share):
            bounds = (graph.constant("zero", int64(0)), graph.constant("one", int64(1)), last)
            first_T1 = graph.op("Slice", [best, *bounds], f"{name}.best_score")
            least = graph.op("Mul", [first_T1, _number(graph, "gate_share", share)], f"{name}.least_score")
            return graph.op("GreaterOrEqual", [best, least], f"{name}.is_visited")
        case _:
            assert_never(choice)


def _number(graph: GraphWriter, name: str, value: float) -> ir.Value:
    return graph.constant(name, np.array(value, np.float32))
