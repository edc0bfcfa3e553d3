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
from dense2moe.export.nodes.linear import Linear
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.planned import PlannedTwin
from dense2moe.export.quantization.twin import Bias, Twin
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker, weights_of
from dense2moe.export.tracing.tracer import Modules, Trace


def lower_experts(trace: Trace, graph: GraphWriter, twin: Twin, lowering: Lowering, activation_bits: int) -> None:
    """Replace every `Experts`."""
    for marker, name in find_markers(trace, "Experts"):
        x, weights, chosen = marker.inputs[:3]
        assert x is not None
        assert weights is not None
        assert chosen is not None
        stack = trace.experts[name].stack
        graph.enter_stream(f"stack_{stack}." if stack else "")
        replace_marker(
            trace,
            marker,
            graph,
            lowering.lower_chosen(graph, describe_layer(trace, twin, name, activation_bits), x, weights, chosen),
        )
    graph.enter_stream("")


def describe_layer(trace: Modules, twin: Twin | PlannedTwin, name: str, activation_bits: int) -> MoeLayer:
    """A module of experts as lowerings see it.

    Its routing is the one that `lower_chosen` leaves to an operator.
    """
    module = trace.experts[name]
    width, hidden = module.intermediate_size, module.hidden_size

    def one(parameter: str, start: int, count: int) -> Linear:
        """Rows of a parameter, and as many elements of its bias."""
        found = weights_of(trace, twin, f"{name}.{parameter}", start, start + count)
        if len(found) != 1:
            raise ExportError(
                f"{name}.{parameter}: the matrix of an expert lies in the checkpoint in {len(found)} pieces; it must "
                "be one"
            )
        bias = bias_of(f"{name}.{parameter}_bias", start, count) if module.has_bias else None
        return Linear(found[0], bias)

    def bias_of(parameter: str, start: int, count: int) -> Bias:
        pieces = trace.located[parameter]
        if len(pieces) != 1:
            raise ExportError(f"{parameter} lies in the checkpoint in {len(pieces)} pieces; it must be one")
        return Bias(twin.entries[pieces[0].name], (start, start + count))

    def expert(number: int) -> Expert:
        down = one("down_proj", hidden * number, hidden)
        if not module.is_gated:
            return Expert(None, one("up_proj", width * number, width), down)
        gate, up = (one("gate_up_proj", width * (2 * number + part), width) for part in (0, 1))
        return Expert(gate, up, down)

    experts = tuple(expert(number) for number in range(module.gate.num_experts))
    return MoeLayer(
        names.experts(module.layer) + module.suffix, module.gate, experts, activation_bits, module.activation
    )
