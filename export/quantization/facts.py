"""What was quantized, as records of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from dense2moe.upcycle.models.parts import TensorClass
from dense2moe.upcycle.tasks.figure import Figure


@dataclass(frozen=True, order=True)
class Unit:
    """Tensors with common bits: one class in one layer.

    Outside of layers the layer is -1.
    """

    layer: int
    tensors: TensorClass

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.tensors if self.layer < 0 else f"{self.tensors} of layer {self.layer}"


@dataclass(frozen=True)
class Sensitivity:
    """A unit in some bits: its bytes, and its own cost.

    The bytes are those in the package.
    """

    unit: Unit
    bits: int
    num_bytes: int
    kl: float


@dataclass(frozen=True)
class SearchPoint:
    """A measured choice of bits.

    Bytes of the package's weights, figures on the validation text, and what it is.
    """

    package_bytes: int
    figures: tuple[Figure, ...]
    label: str
    chosen: bool


@dataclass(frozen=True)
class BitSearch:
    """The outcome of a search: measured points, and the limit.

    Points are sorted by bytes, the smallest first. And every unit's cost and bits. `bits` are the chosen ones: of each
    class by layer, or, outside of layers, of one.
    """

    points: tuple[SearchPoint, ...]
    reference_figures: tuple[Figure, ...]
    limit: str
    num_tokens: int
    bits: dict[TensorClass, tuple[int, ...]]
    sensitivities: tuple[Sensitivity, ...]


@dataclass(frozen=True)
class QuantizeFacts:
    """Quantized weights: bits by class, bytes of experts, quantized share.

    `block_size` is None where each row has one scale.

    Bits are the mean of a class where its tensors differ. Of calibration: tokens of the expert that saw the fewest,
    None without calibration, and matrices that saw too few for GPTQ; by layer, tokens of its experts, and its routing
    before and after correction, in words; groups of matrices whose inputs are scaled, those that are best unscaled, and
    those that have nothing to fold scales into. `search` is how the bits of variant 'mixed' were found. `warnings` say
    what makes the variant worse than it could be, and how to mend it.
    """

    bits: dict[TensorClass, float]
    block_size: int | None
    zero_points: bool
    expert_bytes: int
    quantized_expert_share: float
    quantized_bytes: int
    num_quantized_tensors: int
    method: str
    fewest_expert_tokens: int | None
    num_matrices_with_few_tokens: int
    tokens_by_layer: dict[int, str]
    routing_by_layer: dict[int, str]
    num_scaled_groups: int
    num_groups_best_unscaled: int
    num_groups_without_place: int
    search: BitSearch | None = None
    warnings: tuple[str, ...] = ()
