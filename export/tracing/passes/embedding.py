"""The embedding gets its table.

1. `Embedding(input_ids)` → `Gather` of the table's rows, or `GatherBlockQuantized` where the twin has quantized it.

Left alone: other embeddings, as of positions: the trace has them with their weights, in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from dense2moe.export.errors import ExportError
from dense2moe.export.nodes.embedding import TABLE, add_embedding
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.parameters import RowRange
from dense2moe.export.quantization.twin import FloatWeight, Twin
from dense2moe.export.tracing.passes.markers import find_markers, replace_marker, weights_of
from dense2moe.export.tracing.tracer import Trace

Tables = dict[tuple[RowRange, ...], ir.Value]


def lower_embedding(trace: Trace, graph: GraphWriter, twin: Twin) -> Tables:
    """Replace the one `Embedding`.

    Returns its float table, by where that lies in the checkpoint.
    """
    tables: Tables = {}
    for marker, name in find_markers(trace, "Embedding"):
        (ids,) = marker.inputs
        assert ids is not None
        weights = weights_of(trace, twin, f"{name}.weight")
        if len(weights) != 1:
            raise ExportError(f"{name} lies in the checkpoint in {len(weights)} pieces; the table must be one tensor")
        replace_marker(trace, marker, graph, add_embedding(graph, weights[0], ids))
        if isinstance(weights[0], FloatWeight):
            tables[trace.located[f"{name}.weight"]] = graph.initializers[TABLE]
    return tables
