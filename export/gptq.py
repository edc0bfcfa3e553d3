"""GPTQ: integers chosen column by column, each column's error made good by those after it.

The loss of a matrix W [N, K] on inputs X [T, K] is |X W' - X Q'|², which depends on X through H = X'X alone. Rounding column j leaves an error that
the columns not yet rounded can make up for best by the inverse of H among themselves; its Cholesky factor holds all those inverses at once (Frantar
et al., GPTQ, 2023, sections 3.2 and 3.3). Columns are taken in their order; a block's scale is searched when its first column comes, on the weights
as they then are, with the squared error of each column weighted by its H_jj.
"""

from __future__ import annotations

import torch

from export.quantization import Quantized, cut, encode, round_to, search_scales

_LAZY_COLUMNS = 128
"""Columns whose errors reach the later ones together; every block size divides it."""
_DAMPING = 0.01
"""Of the mean of H's diagonal, added to it (GPTQ, section 3.3)."""


def quantize_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, block_size: int, scale_type: torch.dtype = torch.float32, zero_points: bool = False
) -> Quantized:
    """Quantize a weight [N, K] for inputs whose second moments X'X are `hessian` [K, K], to `bits` in blocks of `block_size`, maybe with zero points.

    An input that is always zero bears on nothing: its column is rounded, and has no error to pass on. Where all inputs are zero this is `quantize`.

    Raises:
        ValueError: the weight or the moments are no matrices of finite values, or do not fit each other.
    """
    rows, width = weight.shape
    if hessian.shape != (width, width) or not torch.isfinite(weight).all() or not torch.isfinite(hessian).all():
        raise ValueError(f"weight {tuple(weight.shape)} and moments {tuple(hessian.shape)} must be finite and fit each other")
    blocked = cut(weight, block_size)
    blocks, padded = blocked.shape[1], blocked.shape[1] * block_size
    w = blocked.flatten(1)
    factor, importance = torch.eye(padded), torch.zeros(padded)
    factor[:width, :width] = _inverse_factor(hessian)
    importance[:width] = hessian.diagonal()
    integers, scales, zeros = torch.zeros(rows, padded), torch.zeros(rows, blocks, 1), torch.zeros(rows, blocks, 1)
    scale = unit = zero = torch.zeros(rows, 1)
    for start in range(0, padded, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, padded)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            if column % block_size == 0:
                block = slice(column, column + block_size)
                found = search_scales(w[:, None, block], bits, importance[None, block], scale_type, zero_points)
                scale, unit, zero = (value[:, 0] for value in found)
                scales[:, column // block_size], zeros[:, column // block_size] = scale * unit, zero
            rounded = round_to(w[:, column : column + 1] / unit, scale, zero, bits)
            integers[:, column] = rounded[:, 0]
            error = (w[:, column : column + 1] - rounded * scale * unit) / factor[column, column]
            w[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error[:, 0]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return encode(integers.view(rows, blocks, block_size), scales, zeros, bits, zero_points)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse of H, float32 [K, K]; an input that is always zero stands alone in it."""
    h = hessian.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.double() + _DAMPING * h.diagonal()[~dead].mean().nan_to_num())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
