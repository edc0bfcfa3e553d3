"""A graph without its `If` nodes, for every way through it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import onnx

_BRANCHES = ("then_branch", "else_branch")


def take_branches(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """The model without `If` nodes, once for every way through.

    Nodes with one condition take the same branch. The model itself where it has no `If`. Nodes and weights of the
    branch taken lie among the other nodes and weights, and the branch's outputs have the names of the node's outputs.
    """
    conditions = list(dict.fromkeys(node.input[0] for node in model.graph.node if node.op_type == "If"))
    if not conditions:
        return [model]
    ways = itertools.product(_BRANCHES, repeat=len(conditions))
    return [_take(model, dict(zip(conditions, way, strict=True))) for way in ways]


def _take(model: onnx.ModelProto, branches: Mapping[str, str]) -> onnx.ModelProto:
    taken = onnx.ModelProto()
    taken.CopyFrom(model)
    del taken.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "If":
            taken.graph.node.append(node)
            continue
        branch = branches[node.input[0]]
        body = next(attribute.g for attribute in node.attribute if attribute.name == branch)
        names = dict(zip((value.name for value in body.output), node.output, strict=True))
        taken.graph.initializer.extend(body.initializer)
        for inner in body.node:
            copy = taken.graph.node.add()
            copy.CopyFrom(inner)
            copy.input[:] = [names.get(name, name) for name in inner.input]
            copy.output[:] = [names.get(name, name) for name in inner.output]
    return taken
