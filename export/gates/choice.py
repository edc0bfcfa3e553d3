"""The choice of experts by selection scores, as nodes."""

from __future__ import annotations

from typing import assert_never

import onnx_ir as ir

from dense2moe.export.nodes.writer import GraphWriter, int64
from dense2moe.upcycle.gates.gate import Choice, TopK


def add_choice(graph: GraphWriter, choice: Choice, scores: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Chosen experts of each token, int64 [T, K], and their selection scores.

    Returns the selection scores [T, K] first, then the experts' numbers.
    """
    match choice:
        case TopK(k):
            count = graph.constant("num_experts_per_tok", int64(k))
            values_TK, chosen_TK = graph.op_multi(
                "TopK", [scores, count], [f"{name}.top_k", f"{name}.chosen"], {"axis": -1}
            )
            return values_TK, chosen_TK
        case _:
            assert_never(choice)
