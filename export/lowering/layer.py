"""The input of a lowering: one layer of experts."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dense2moe.export.coverage import Activation
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.quantization.twin import FloatWeight, QuantizedWeight, Weight
from dense2moe.export.variant import Device, ElementType
from dense2moe.upcycle.gates.gate import Gate


@dataclass(frozen=True)
class Expert:
    """One gated expert's matrices: gate and up [I, H], down [H, I]."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class MoeLayer:
    """One layer of experts, as lowerings see it.

    Its name in the graph, how tokens choose experts, its experts with the function of their own gate, the bits of
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
    def hidden_size(self) -> int:
        """H, the width of the residual stream."""
        return self.experts[0].gate.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I, the width of one expert."""
        return self.experts[0].gate.shape[0]

    @property
    def quantized(self) -> bool:
        """Whether the experts are integers."""
        return isinstance(self.experts[0].gate, QuantizedWeight)

    @property
    def static(self) -> bool:
        """Whether the experts are integers that multiply integers."""
        gate = self.experts[0].gate
        return isinstance(gate, QuantizedWeight) and gate.is_static


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
