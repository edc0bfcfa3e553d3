"""A graph without its `If` nodes: the same branch taken everywhere."""

from __future__ import annotations

import onnx

_BRANCHES = ("then_branch", "else_branch")


def take_branches(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """The model without `If` nodes, once for either branch of all.

    The model itself where it has no `If`. Nodes and weights of the branch taken lie among the other nodes and weights,
    and the branch's outputs have the names of the node's outputs.
    """
    if not any(node.op_type == "If" for node in model.graph.node):
        return [model]
    return [_take(model, branch) for branch in _BRANCHES]


def _take(model: onnx.ModelProto, branch: str) -> onnx.ModelProto:
    taken = onnx.ModelProto()
    taken.CopyFrom(model)
    del taken.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "If":
            taken.graph.node.append(node)
            continue
        body = next(attribute.g for attribute in node.attribute if attribute.name == branch)
        names = dict(zip((value.name for value in body.output), node.output, strict=True))
        taken.graph.initializer.extend(body.initializer)
        for inner in body.node:
            copy = taken.graph.node.add()
            copy.CopyFrom(inner)
            copy.input[:] = [names.get(name, name) for name in inner.input]
            copy.output[:] = [names.get(name, name) for name in inner.output]
    return taken
