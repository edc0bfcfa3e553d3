"""Markers of a traced graph, found and replaced by nodes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.parameters import RowRange
from dense2moe.export.quantization.planned import PlannedTwin
from dense2moe.export.quantization.twin import Twin, Weight
from dense2moe.export.tracing.marking import DOMAIN
from dense2moe.export.tracing.tracer import Modules, Trace


def find_markers(trace: Trace, op_type: str) -> Iterator[tuple[ir.Node, str]]:
    """Markers of one kind, and the name each stands for."""
    for node in find_nodes(trace, op_type):
        yield node, node.attributes["name"].as_string()


def find_nodes(trace: Trace, op_type: str) -> list[ir.Node]:
    """Markers of one kind, those without names too."""
    return [node for node in trace.model.graph if node.domain == DOMAIN and node.op_type == op_type]


def replace_marker(trace: Trace, marker: ir.Node, graph: GraphWriter, value: ir.Value) -> None:
    """Replace a marker by the nodes that `graph` has written.

    The last of them computes `value`.
    """
    (old,) = marker.outputs
    value.shape, value.type = old.shape, old.type
    trace.model.graph.insert_before(marker, graph.take_nodes())
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    trace.model.graph.remove(marker, safe=True)


def weights_of(
    trace: Modules, twin: Twin | PlannedTwin, parameter: str, start: int = 0, stop: int | None = None
) -> tuple[Weight, ...]:
    """A parameter's rows in the twin, in as few pieces as possible."""
    found, begin = [], 0
    for piece in trace.located[parameter]:
        end = begin + piece.stop - piece.start
        first, last = max(start, begin), end if stop is None else min(stop, end)
        if first < last:
            own = RowRange(piece.name, piece.start + first - begin, piece.start + last - begin)
            found.append(twin.weight(own.name, (own.start, own.stop)))
        begin = end
    return tuple(found)
