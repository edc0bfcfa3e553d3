"""The fused operator for a decode step, `grouped` for prefill.

One graph has both, behind an `If` on the number of tokens.

On the CPU `QMoE` is the faster of the two for a few tokens, where `grouped` pays for its nodes, and the slower one for
many. Each branch has weights of its own, since of a subgraph onnxruntime packs for its kernels only those, and the two
operators want them in other orders: so experts are twice in the file and twice in memory. That is why it is to be asked
for by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from packaging.version import Version

from dense2moe.export.gates.logits import is_the_operators
from dense2moe.export.gates.routes import add_routes
from dense2moe.export.lowering import grouped, qmoe
from dense2moe.export.lowering.layer import MoeInput, MoeLayer, add_hidden_shape
from dense2moe.export.nodes.writer import GraphWriter, int64

NAME = "switched"
_STEP_TOKENS = 4
"""Tokens that are a decode step at most: at 150 M parameters both take as long from 4 to 8 on."""

_Write = Callable[[GraphWriter, MoeLayer], ir.Value]


def refusal(layer: MoeLayer) -> str | None:
    """Why this lowering cannot express the layer, or None."""
    return qmoe.refusal(layer)


def min_onnxruntime(layer: MoeLayer) -> str:
    """The oldest onnxruntime that computes both branches correctly."""
    return max(qmoe.min_onnxruntime(layer), grouped.min_onnxruntime(layer), key=Version)


def lower(graph: GraphWriter, layer: MoeLayer, x: MoeInput) -> ir.Value:
    """The layer's output [B, S, H], by the branch that fits.

    A gate that the operator does not know routes before the branches, once.
    """
    if not is_the_operators(layer.gate):
        routes = add_routes(graph, layer.gate, layer.selection_bias, x.router_logits, layer.name)
        return add_hidden_shape(graph, lower_chosen(graph, layer, x.tokens, *routes), x.hidden, f"{layer.name}.output")
    return _add_switch(
        graph,
        layer,
        x.tokens,
        lambda branch, own: qmoe.lower(branch, own, x),
        lambda branch, own: grouped.lower(branch, own, x),
        f"{layer.name}.output",
    )


def lower_chosen(
    graph: GraphWriter, layer: MoeLayer, tokens: ir.Value, weights: ir.Value, chosen: ir.Value
) -> ir.Value:
    """The layer's output [T, H], from experts chosen outside.

    For tokens [T, H], and experts with their weights [T, K].
    """
    return _add_switch(
        graph,
        layer,
        tokens,
        lambda branch, own: qmoe.lower_chosen(branch, own, tokens, weights, chosen),
        lambda branch, own: grouped.lower_chosen(branch, own, tokens, weights, chosen),
        f"{layer.name}.output_by_token",
    )


def _add_switch(
    graph: GraphWriter, layer: MoeLayer, tokens: ir.Value, step: _Write, prefill: _Write, name: str
) -> ir.Value:
    """An `If`: `step` writes the layer for few tokens, `prefill` for many.

    Both read tokens [T, H].

    Both float32, and of one shape.
    """
    is_step = graph.shared("is_step", lambda: _add_condition(graph, tokens))
    branches = {}
    for attribute, prefix, write in (("then_branch", "step", step), ("else_branch", "prefill", prefill)):
        branch = graph.branch(f"{layer.name}.{prefix}.")
        branches[attribute] = branch.close(write(branch, replace(layer, name="experts")), f"{layer.name}.{prefix}")
    return graph.op("If", [is_step], name, branches)


def _add_condition(graph: GraphWriter, tokens: ir.Value) -> ir.Value:
    shape = graph.op("Shape", [tokens], "num_tokens_shape", {"start": 0, "end": 1})
    num_tokens = graph.op("Squeeze", [shape, graph.constant("zero", int64(0))], "num_tokens")
    return graph.op(
        "LessOrEqual", [num_tokens, graph.constant("step_tokens", np.array(_STEP_TOKENS, np.int64))], "is_step"
    )
