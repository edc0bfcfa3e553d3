"""Experts get the chosen lowering.

1. `Experts(x [T, H], weights [T, k], chosen [T, k])` → the nodes of the lowering, which computes the chosen experts
   only. The choice and its weights are the model's own nodes, so any routing is right; an operator that routes by
   itself is told it by logarithms (`gates/logits.py`).
2. Its fourth input, the router logits, has been tapped for parity and is dropped.

Left alone: shared experts, which every token visits: they are plain products.
"""

from __future__ import annotations

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.lowering import Expert, Lowering, MoeLayer
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.twin import Twin, Weight
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker, weights_of
from dense2moe.export.tracing.tracer import Trace
from dense2moe.upcycle.gates.gate import Gate, TopK


def lower_experts(trace: Trace, graph: GraphWriter, twin: Twin, lowering: Lowering, activation_bits: int) -> None:
    """Replace every `Experts`."""
    for marker, name in find_markers(trace, "Experts"):
        x, weights, chosen = marker.inputs[:3]
        assert x is not None
        assert weights is not None
        assert chosen is not None
        replace_marker(
            trace,
            marker,
            graph,
            lowering.lower_chosen(graph, describe_layer(trace, twin, name, activation_bits), x, weights, chosen),
        )


def describe_layer(trace: Trace, twin: Twin, name: str, activation_bits: int) -> MoeLayer:
    """A module of experts as lowerings see it.

    Its routing is the one that `lower_chosen` leaves to an operator.
    """
    module = trace.experts[name]
    width, hidden = module.intermediate_size, module.hidden_size

    def rows(parameter: str, start: int, count: int) -> Weight:
        found = weights_of(trace, twin, f"{name}.{parameter}", start, start + count)
        if len(found) != 1:
            raise ExportError(
                f"{name}.{parameter}: the matrix of an expert lies in the checkpoint in {len(found)} pieces; it must "
                "be one"
            )
        return found[0]

    experts = tuple(
        Expert(
            rows("gate_up_proj", 2 * width * e, width),
            rows("gate_up_proj", width * (2 * e + 1), width),
            rows("down_proj", hidden * e, hidden),
        )
        for e in range(module.num_experts)
    )
    routing = Gate(module.num_experts, TopK(module.num_experts_per_tok))
    return MoeLayer(names.experts(module.layer), routing, experts, activation_bits, module.activation)
