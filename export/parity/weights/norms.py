"""Norms of any exporter's graph: weights and epsilons.

A norm is one operator, or the mean of squares, an epsilon, a root and a division: a constant is added to a mean, and
what is made of it is multiplied by a vector in the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto

from dense2moe.export.parity.weights.matrix import FloatArray, GraphNorm
from dense2moe.export.parity.weights.values import Values

_OPERATORS = {
    "SimplifiedLayerNormalization": (1, 1e-5),
    "SkipSimplifiedLayerNormalization": (2, 1e-12),
    "RMSNormalization": (1, 1e-5),
}
"""Which input is the weight, and the epsilon of an operator that gives none."""
_BETWEEN = ("Sqrt", "Reciprocal", "Pow", "Div", "Mul", "Cast")
_MOST_NODES = 12  # from the mean to the weight


def find_norms(values: Values) -> Iterator[GraphNorm]:
    """Norms by the root of the mean of squares."""
    readers: dict[str, list[NodeProto]] = {}
    for node in values.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in values.nodes:
        if node.op_type in _OPERATORS:
            place, epsilon = _OPERATORS[node.op_type]
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if (weight := _read_vector(values, node.input[place])) is not None:
                yield GraphNorm(node.output[0], weight, float(settings.get("epsilon", epsilon)))
        elif node.op_type == "Add" and (number := _read_epsilon(values, node)) is not None:
            found = _find_weight(values, readers, node.output[0])
            if found is not None:
                yield GraphNorm(found[0], found[1], number)


def _read_epsilon(values: Values, node: NodeProto) -> float | None:
    """The number that is added to a mean."""
    for mean, number in (node.input, list(node.input)[::-1]):
        maker = values.makers.get(mean)
        while maker is not None and maker.op_type == "Cast":
            maker = values.makers.get(maker.input[0])
        if maker is None or maker.op_type != "ReduceMean" or (found := values.find(number)) is None:
            continue
        if int(np.prod(found[1])) == 1:
            return float(found[0]().reshape(-1)[0])
    return None


def _find_weight(values: Values, readers: dict[str, list[NodeProto]], start: str) -> tuple[str, FloatArray] | None:
    """The first product with a vector behind a value, and the vector."""
    waiting = [start]
    for _ in range(_MOST_NODES):
        if not waiting:
            return None
        for node in readers.get(waiting.pop(0), ()):
            if node.op_type == "Mul":
                for name in node.input:
                    if (vector := _read_vector(values, name)) is not None:
                        return node.output[0], vector
            if node.op_type in _BETWEEN:
                waiting.append(node.output[0])
    return None


def _read_vector(values: Values, name: str) -> FloatArray | None:
    found = values.find(name)
    if found is None or int(np.prod(found[1])) < 2 or max(found[1]) != int(np.prod(found[1])):
        return None
    return found[0]().reshape(-1)
