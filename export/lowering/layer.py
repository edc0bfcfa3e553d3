"""What a lowering is given: one mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass

from export.config import Device, ElementType
from export.gating import Activation
from export.routing import Routing
from export.twin import QuantizedWeight, Weight


@dataclass(frozen=True)
class Expert:
    """The three matrices of one gated expert: gate and up [I, H], down [H, I]."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class MoeLayer:
    """One layer, as the lowerings see it.

    Its name in the graph, the routing's meaning, its experts with the function of their gate, the bits of products' activations, and the graph's
    element type and the device that it is written for.
    """

    name: str
    routing: Routing
    experts: tuple[Expert, ...]
    activation_bits: int
    activation: Activation = "silu"
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
