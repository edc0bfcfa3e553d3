"""Pieces of a target tensor, in the order of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.models.parts import Fold


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a tensor; elements of a vector.

    `checkpoint` is the number of the checkpoint that the tensor is of: 0 the base, then the sources in order.
    """

    source: str
    start: int
    stop: int
    checkpoint: int = 0


@dataclass(frozen=True)
class Keep:
    """The slice as it is, or with arithmetic folded in."""

    rows: Slice
    fold: Fold | None = None


@dataclass(frozen=True)
class Merged:
    """The base's slice and the sources' same slices, made one.

    The method is `UpcycleConfig.merging`; arithmetic is folded in afterwards.
    """

    rows: Slice
    fold: Fold | None = None


@dataclass(frozen=True)
class ExpertPart:
    """Some neurons of one FFN matrix, as one expert has them.

    `neuron_axis` is 0 in gate and up, whose rows are neurons, and 1 in down. `expert` names the expert over all layers:
    the neurons that are drawn anew are the same in its gate, up and down. `routed` is false of a shared expert.
    `transposed`: the matrix lies the other way round in its file.
    """

    matrix: Slice
    neuron_axis: int
    neurons: tuple[int, int]
    expert: str
    drop: float = 0.0
    noise: float = 0.0
    scale: float = 1.0
    routed: bool = True
    transposed: bool = False

    @property
    def num_neurons(self) -> int:
        """Neurons of the expert."""
        return self.neurons[1] - self.neurons[0]


@dataclass(frozen=True)
class Zeros:
    """Zeros: of a silent shared expert, or of its scale.

    A scale of zeros has a sigmoid of one half.
    """

    num_elements: int


@dataclass(frozen=True)
class SelectionBias:
    """A gate's selection bias: zeros at first; a buffer, no parameter."""

    num_elements: int


@dataclass(frozen=True)
class RouterRows:
    """A router's rows, each repeated `repeat` times, at an FFN.

    `site` is the number of the FFN in the model.
    `norms`, as they are applied, and `embedding` say how long the vectors are that it reads. `std` of what rows give;
    that of the settings where there is none.
    """

    site: int
    num_rows: int
    repeat: int
    norms: tuple[Keep, ...]
    embedding: str | None
    std: float | None = None


@dataclass(frozen=True)
class RouterKeys:
    """Rows of a router that reads what its first matrix gives.

    Each repeated `repeat` times; their elements are drawn with a deviation of `std`.
    """

    num_rows: int
    repeat: int
    std: float


Piece = Keep | Merged | ExpertPart | Zeros | SelectionBias | RouterRows | RouterKeys


@dataclass(frozen=True)
class Write:
    """One target tensor and the pieces that make it."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Site:
    """One FFN that becomes experts: its stack and its layer there."""

    stack: int
    layer: int
