"""The embedding gets its table.

1. `Embedding(input_ids)` → `Gather` of the table's rows, or `GatherBlockQuantized` where the twin has quantized it.

Left alone: other embeddings, as of positions: the trace has them with their weights, in float32.
"""

from __future__ import annotations

from dense2moe.export.errors import ExportError
from dense2moe.export.nodes.embedding import add_embedding
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker, weights_of
from dense2moe.export.tracing.tracer import Trace


def lower_embedding(trace: Trace, graph: GraphWriter, twin: Twin) -> None:
    """Replace the one `Embedding`."""
    for marker, name in find_markers(trace, "Embedding"):
        (ids,) = marker.inputs
        assert ids is not None
        weights = weights_of(trace, twin, f"{name}.weight")
        if len(weights) != 1:
            raise ExportError(f"{name} lies in the checkpoint in {len(weights)} pieces; the table must be one tensor")
        replace_marker(trace, marker, graph, add_embedding(graph, weights[0], ids))
