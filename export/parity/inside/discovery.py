"""Places inside any exporter's graph, found by their weights.

Names of values are their exporter's own, but a product by the output matrix of layer 3's attention gives what that
attention gives, and reads what its heads have attended to; what its result is added to is the residual stream before
it. So a graph whose weights are known (`dense2moe.export.parity.weights.rows`) is known inside, as far as its nodes are
those of a decoder: products, and additions to one residual stream. What is not found is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from dense2moe.export.names import count_layers
from dense2moe.export.parity.place import OUTSIDE, Place, PlacePart
from dense2moe.export.parity.taps import Taps
from dense2moe.export.parity.weights.matrix import GraphMatrix
from dense2moe.export.parity.weights.rows import FoundWeights
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import QUERY_KEY_VALUE

_VIEWS = ("Reshape", "Identity", "Cast", "Flatten", "Squeeze", "Unsqueeze")
_JOINS = ("Add", "SkipSimplifiedLayerNormalization")


def discover_taps(
    model: onnx.ModelProto, found: FoundWeights, family: Architecture, tied: bool, shared_outside: bool
) -> Taps:
    """A graph's places, found by its weights.

    `tied`: the head is the embedding's matrix.
    """
    graph = _Graph(model.graph, found)
    num_layers = count_layers(value.name for value in model.graph.input)
    names: dict[Place, tuple[str, ...]] = {}

    def add(layer: int, part: PlacePart, *values: str | None) -> None:
        if all(values):
            names[layer, part] = tuple(dict.fromkeys(value for value in values if value))

    routers: list[str] = []
    num_experts = 0
    for n in range(num_layers):
        products = [graph.product(family.name(part, n)) for part in QUERY_KEY_VALUE]
        if all(products):
            add(n, "query, key and value", *(graph.with_bias(product.value) for product in products if product))
            read = {product.given for product in products if product}
            if family.find("attention_norm") is not None and len(read) == 1:
                add(n, "attention norm", products[0].given if products[0] else None)
        output = graph.product(family.name("attention_output", n))
        if output is None:
            continue
        given = graph.with_bias(output.value)
        add(n, "attention", output.given)
        add(n, "attention output", given)
        before, attended = graph.join(given)
        add(*((n - 1, "residual stream") if n else (OUTSIDE, "embedding")), before)
        router = graph.product(family.name("router", n)) if family.find("router") is not None else None
        if router is not None:
            logits = graph.with_bias(router.value)
            add(n, "router", logits)
            if router.narrow is None:
                routers.append(logits)
                num_experts = router.shape[0]
        dense = graph.product(family.ffn.up.format(layer=n)) if family.ffn is not None and router is None else None
        if family.find("ffn_norm") is not None and (first := router or dense) is not None:
            add(n, "FFN norm", first.given)
        update, behind = graph.join(attended, update_is_other=True) if attended else (None, None)
        add(n, "residual stream", behind)
        if not shared_outside or router is None:
            add(n, "experts" if router is not None else "FFN", graph.before_factor(update) if update else None)
    head = graph.product(family.name("embedding") if tied else family.name("head"))
    if head is not None:
        add(OUTSIDE, "final norm", head.given)
    return Taps(names, num_layers, tuple(routers), num_experts)


class _Graph:
    """Producer and readers of each value, and products by tensor.

    The tensors are the twin's.
    """

    def __init__(self, graph: onnx.GraphProto, found: FoundWeights) -> None:
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.constants |= {
            node.output[0]: a.t
            for node in graph.node
            if node.op_type == "Constant"
            for a in node.attribute
            if a.name == "value"
        }
        self.found = found

    def product(self, tensor: str) -> GraphMatrix | None:
        """The only product by a tensor; None unless exactly one."""
        products = [
            matrix
            for matrix in self.found.operators.get(tensor, ())
            if matrix.use == "product" and matrix.expert is None
        ]
        return products[0] if len({product.value for product in products}) == 1 else None

    def with_bias(self, value: str) -> str:
        """A product's result with its bias added."""
        for node in self.readers.get(value, ()):
            if node.op_type == "Add" and any(self._is_vector(name) for name in node.input):
                return str(node.output[0])
        return value

    def join(self, value: str, update_is_other: bool = False) -> tuple[str | None, str | None]:
        """Where a value is added to another: that other, and the sum.

        With `update_is_other` no factor stands before it.
        """
        if not update_is_other:
            while (only := self._only_reader(value)) is not None and (only.op_type in _VIEWS or self._scales(only)):
                value = only.output[0]
        for node in self.readers.get(value, ()):
            if node.op_type in _JOINS and not any(self._is_constant(name) for name in node.input[:2]):
                other = node.input[1] if node.input[0] == value else node.input[0]
                behind = node.output[0] if node.op_type == "Add" else node.output[3] if len(node.output) > 3 else ""
                return (other, behind) if behind else (other, None)
        return None, None

    def before_factor(self, value: str) -> str:
        """The value before a multiplication by a number."""
        maker = self.makers.get(value)
        if maker is None or not self._scales(maker):
            return value
        return next(str(name) for name in maker.input if not self._is_constant(name))

    def _only_reader(self, value: str) -> onnx.NodeProto | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 else None

    def _scales(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Mul" and any(
            self._is_constant(name) and not self._is_vector(name) for name in node.input
        )

    def _is_constant(self, name: str) -> bool:
        return name in self.constants or all(source in self.constants for source in self._sources(name))

    def _sources(self, name: str) -> Iterator[str]:
        maker = self.makers.get(name)
        if maker is None or maker.op_type not in _VIEWS:
            yield name
        else:
            yield from self._sources(maker.input[0])

    def _is_vector(self, name: str) -> bool:
        tensor = self.constants.get(name)
        return tensor is not None and len(tensor.dims) > 0 and any(size > 1 for size in tensor.dims)
