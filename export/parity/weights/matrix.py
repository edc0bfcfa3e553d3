"""Matrices of a graph as float32 rows, read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dense2moe.export.quantization.simulation import StaticRounding

FloatArray = npt.NDArray[np.float32]
Use = Literal["product", "table", "experts", "stored"]
INT8 = 4  # accuracy_level of the operators that read activations in 8 bits


@dataclass(frozen=True)
class Operator:
    """The arithmetic of a product.

    Its operator, the bits and block of its integers, and whether it finds 8-bit scales of its inputs as it runs.
    """

    op: str
    bits: int = 32
    block_size: int = 0
    rounds_inputs: bool = False
    zero_points: bool = False


@dataclass(frozen=True)
class GraphMatrix:
    """Rows [N, K] that one node multiplies by, or gathers from.

    `table`: the node gathers. Of stacked experts those of one. What no node is known to multiply by is `stored`: it
    stands in the file, once as it is and once turned.

    `value` is what the node makes and `given` what it reads, before that is rounded. `narrow`: the floats are stored in
    these 16 bits.
    `input_factors` [K]: what the input is multiplied by just before, which may belong to the matrix or not.
    `input_rounding`: by constants of the file, where they are some.
    """

    value: str
    given: str
    use: Use
    operator: Operator
    shape: tuple[int, int]
    read: Callable[[], FloatArray]
    part: str = ""
    expert: int | None = None
    narrow: torch.dtype | None = None
    input_factors: Callable[[], FloatArray] | None = None
    input_rounding: StaticRounding | None = None

    @property
    def place(self) -> str:
        """Its location in the graph, in words."""
        return (
            self.value
            + (f", {self.part}" if self.part else "")
            + ("" if self.expert is None else f", expert {self.expert}")
        )


@dataclass(frozen=True)
class GraphNorm:
    """A norm of a graph: its value, weight [H] and epsilon."""

    value: str
    weight: FloatArray
    epsilon: float


@dataclass(frozen=True)
class Constants:
    """A package's matrices, vectors of floats, and norms.

    `unread` are integers that nothing is known to read as a matrix. `expert_biases` [E, N] are those that an operator
    adds to its experts' products; gate and up may be in turns, and zeros behind them fill a block. `rounded`: values
    that the graph rounds to 8 bits for something else than a product by one of the matrices.
    """

    matrices: tuple[GraphMatrix, ...]
    vectors: tuple[FloatArray, ...]
    norms: tuple[GraphNorm, ...] = ()
    unread: tuple[str, ...] = ()
    expert_biases: tuple[FloatArray, ...] = ()
    rounded: tuple[str, ...] = ()
