"""The input of a lowering: one layer of experts."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dense2moe.export.coverage import Activation
from dense2moe.export.nodes.linear import Linear
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.twin import FloatWeight, QuantizedWeight, Weight
from dense2moe.export.variant import Device, ElementType
from dense2moe.upcycle.gates.gate import Gate


@dataclass(frozen=True)
class Expert:
    """One expert's matrices: gate, if any, up and down."""

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def first(self) -> tuple[Linear, ...]:
        """The matrices that read the token: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class MoeLayer:
    """One layer of experts, as lowerings see it.

    Its name in the graph, how tokens choose experts, its experts, which are alike, with their activation, the bits of
    products' activations, and the graph's element type and the device that it is written for. `selection_bias` [1, E]
    is there where the gate has one.
    """

    name: str
    gate: Gate
    experts: tuple[Expert, ...]
    activation_bits: int
    activation: Activation = "silu"
    selection_bias: FloatWeight | None = None
    element_type: ElementType = "float32"
    device: Device = "cpu"

    @property
    def matrix(self) -> Weight:
        """One of the matrices [I, H], which are all stored alike."""
        return self.experts[0].up.weight

    @property
    def is_gated(self) -> bool:
        """Whether its experts have gates."""
        return self.experts[0].gate is not None

    @property
    def first_name(self) -> str:
        """What the product of an expert's first matrices is called."""
        return "gate_up" if self.is_gated else "up"

    @property
    def hidden_size(self) -> int:
        """H, the width of the residual stream."""
        return self.matrix.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I, the width of one expert."""
        return self.matrix.shape[0]

    @property
    def quantized(self) -> bool:
        """Whether the experts are integers."""
        return isinstance(self.matrix, QuantizedWeight)

    @property
    def static(self) -> bool:
        """Whether the experts are integers that multiply integers."""
        return isinstance(self.matrix, QuantizedWeight) and self.matrix.is_static


@dataclass(frozen=True)
class MoeInput:
    """The inputs of a layer of experts.

    Hidden float32 [B, S, H], the same as tokens [T = B * S, H] in the graph's element type, and router_logits [T, E].
    """

    hidden: ir.Value
    tokens: ir.Value
    router_logits: ir.Value


def add_hidden_shape(graph: GraphWriter, tokens: ir.Value, hidden: ir.Value, name: str) -> ir.Value:
    """A result reshaped to the shape of `hidden` [B, S, H].

    The result has as many elements as `hidden`.
    """
    shape = graph.shared("hidden_shape", lambda: graph.op("Shape", [hidden], "hidden_shape"))
    # a length of zero is no wish to copy a dimension
    return graph.op("Reshape", [tokens, shape], name, {"allowzero": 1})
