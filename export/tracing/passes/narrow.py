"""Values in bfloat16 are computed in float32, and rounded as torch does.

onnxruntime's CPU has casts of bfloat16 and nothing else, and Falcon's ALiBi is in it whatever the model is.

1. `Cast(x → bfloat16)` → the same, then `Cast(→ float32)`.
2. Any other node with a result in bfloat16 → it computes in float32, and its result is rounded by 1.
3. A constant in bfloat16 → `Cast(→ float32)` behind it.

Left alone: everything else.
"""

from __future__ import annotations

import onnx_ir as ir

from dense2moe.export.tracing.tracer import Trace


def widen_narrow_values(trace: Trace) -> None:
    """Let nothing read a value in bfloat16 but casts."""
    graph = trace.model.graph
    for value in [*graph.initializers.values()]:
        if value.dtype == ir.DataType.BFLOAT16 and value.uses():
            _read_widened(graph, value, next(iter(graph)), before=True)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.BFLOAT16:
                continue
            if node.op_type != "Cast":
                value.dtype = ir.DataType.FLOAT
                rounded = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
                _name(rounded, value, "rounded", ir.DataType.BFLOAT16)
                value.replace_all_uses_with(rounded.outputs[0])
                rounded.replace_input_with(0, value)
                graph.insert_after(node, rounded)
                _read_widened(graph, rounded.outputs[0], rounded, before=False)
            else:
                _read_widened(graph, value, node, before=False)


def _read_widened(graph: ir.Graph, value: ir.Value, place: ir.Node, before: bool) -> None:
    """Give all who read a value its numbers in float32."""
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    _name(cast, value, "widened", ir.DataType.FLOAT)
    value.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, value)
    (graph.insert_before if before else graph.insert_after)(place, cast)


def _name(node: ir.Node, value: ir.Value, what: str, kind: ir.DataType) -> None:
    (output,) = node.outputs
    node.name = output.name = f"{value.name}_{what}"
    output.dtype, output.shape = kind, value.shape
