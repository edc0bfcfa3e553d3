"""Values that parity reads keep their names.

1. `Tap(x)` → `Identity` with the tap's name as its output: `hidden.N`, `router_logits.N`. A runtime drops it where
   nobody asks for it.

Left alone: everything else.
"""

from __future__ import annotations

from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker
from dense2moe.export.tracing.tracer import Trace


def lower_taps(trace: Trace, graph: GraphWriter) -> None:
    """Replace every `Tap`."""
    for marker, name in find_markers(trace, "Tap"):
        replace_marker(trace, marker, graph, graph.op("Identity", marker.inputs, name))
