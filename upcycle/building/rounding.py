"""Rounding that a conversion may add although it keeps the function.

With copied experts and a zero router, k = 2 weighs both experts with exactly one half, and the sum is bitwise the dense
FFN wherever one half of its output is a number of the dtype; every other router rounds, at most `ROUNDING_LIMIT` in
float32.

One torch kernel spoils exact equality: transformers applies the activation to one half of a fused product, and on the
CPU torch computes the last elements of such a strided row of SiLU by another exp than those of a contiguous one. Where
the FFN's width is no multiple of the vector length (172 is not, 768 is), the two models differ in the last bit although
every weight is equal; with the GELU of erf ("gelu") they do at any width in float32. The receipt tries the activation
at the width; there it asks for rounding instead of bitwise equality.

`ROUNDING_LIMIT` is of models that do not magnify rounding. Where it is broken, the dense model's own noise is measured,
float32 against float64 on the same text, and the limit becomes `NOISE_FACTOR` times that if it is larger.
"""

from __future__ import annotations

import math

import torch
from transformers.activations import ACT2FN

from dense2moe.upcycle.building.pieces import ExpertPart, Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import read_chunks

ROUNDING_LIMIT = 1e-5
"""Largest rel in float32 of a router that weighs experts unequally.

Measured 3e-7 to 1e-6 on 4 to 32 layers of every family, times ten.
"""

NOISE_FACTOR = 3
"""Allowed rel in float32, as a multiple of what the dense model in float32 differs by from itself in float64.

Measured 0.1 to 1.0 on six families of
2 to 24 layers with weights of deviation 0.02 to 1, plain, granular and with half a shared expert, whole and by layer.
"""

_LEAST_WEIGHT = 1e-30  # no weight of a model that computes anything is smaller


def rounding_limit(plan: UpcyclePlan, dense: Checkpoint) -> float:
    """Largest rel in float32 that rounding explains.

    Sums are taken in another order, and weights are rounded when they are multiplied. A scale that is a power of two
    rounds nothing but what it makes smaller than the dtype's normal numbers: half of a float16 weight below 1.2e-4 may
    be no float16 number. What it takes from these matrices is measured.
    """
    scaled = {
        (piece.matrix, piece.scale, write.spec.dtype)
        for write in plan.writes
        for piece in write.pieces
        if isinstance(piece, ExpertPart) and piece.scale != 1.0
    }
    rounded = [torch.finfo(dtype).eps for _, scale, dtype in scaled if not _is_power_of_two(scale)]
    shrunk = [item for item in scaled if item[1] < 1 and torch.finfo(item[2]).tiny > _LEAST_WEIGHT]
    losses = [_measure_loss(dense, *item) for item in shrunk]
    return max([ROUNDING_LIMIT, *(10 * lost for lost in (*rounded, *losses))])


def _is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


def _measure_loss(dense: Checkpoint, matrix: Slice, scale: float, dtype: torch.dtype) -> float:
    """Relative error of a scaled matrix stored in `dtype`.

    The norm of the difference over the norm.
    """
    lost = norm = 0.0
    for chunk in read_chunks(dense.entries[matrix.source], matrix.start, matrix.stop):
        exact = chunk.to(torch.float32) * scale
        lost += float((exact.to(dtype).to(torch.float32) - exact).square().sum(dtype=torch.float64))
        norm += float(exact.square().sum(dtype=torch.float64))
    return math.sqrt(lost / norm) if norm > 0 else 0.0


def can_be_bitwise(width: int, activation_name: str, dtype: torch.dtype) -> bool:
    """Whether torch's activation gives strided and contiguous rows equal bits.

    At the width and dtype of an FFN with a gate, on this machine. A million values, since rounding to bfloat16 hides
    nearly all differences: of GELU's, one value in twenty thousand shows.
    """
    fused = torch.randn(max(64, 1_000_000 // width), 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate = fused.chunk(2, dim=-1)[0]
    activation = ACT2FN[activation_name]
    return torch.equal(activation(gate), activation(gate.contiguous()))
