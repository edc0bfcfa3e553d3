"""GPTQ: integers chosen column by column, each column's error made good by those after it.

The loss of a matrix W [N, K] on inputs X [T, K] is |X W' - X Q'|², which depends on X through H = X'X alone. Rounding column j leaves an error that
the columns not yet rounded can make up for best by the inverse of H among themselves; its Cholesky factor holds all those inverses at once (Frantar
et al., GPTQ, 2023, sections 3.2 and 3.3). Columns are taken in their order; a block's scale is searched when its first column comes, on the weights
as they then are, with the squared error of each column weighted by its H_jj.
"""

from __future__ import annotations

import torch

from export.quantization import Quantized, integer_range, num_blocks, pack, round_to, search_scales

_LAZY_COLUMNS = 128
"""Columns whose errors reach the later ones together; every block size divides it."""
_DAMPING = 0.01
"""Of the mean of H's diagonal, added to it (GPTQ, section 3.3)."""


def quantize_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, block_size: int, scale_type: torch.dtype = torch.float32) -> Quantized:
    """Quantize a weight [N, K] for inputs whose second moments X'X are `hessian` [K, K], symmetrically to `bits` in blocks of `block_size`.

    An input that is always zero bears on nothing: its column is rounded, and has no error to pass on. Where all inputs are zero this is `quantize`.

    Raises:
        ValueError: the weight or the moments are no matrices of finite values, or do not fit each other.
    """
    rows, width = weight.shape
    if hessian.shape != (width, width) or not torch.isfinite(weight).all() or not torch.isfinite(hessian).all():
        raise ValueError(f"weight {tuple(weight.shape)} and moments {tuple(hessian.shape)} must be finite and fit each other")
    low, high = integer_range(bits)
    blocks = num_blocks(width, block_size)
    padded = blocks * block_size
    w = torch.zeros(rows, padded)
    w[:, :width] = weight
    factor, importance = torch.eye(padded), torch.zeros(padded)
    factor[:width, :width] = _inverse_factor(hessian)
    importance[:width] = hessian.diagonal()
    codes, scales = torch.zeros(rows, padded, dtype=torch.uint8), torch.zeros(rows, blocks)
    scale = unit = torch.zeros(rows, 1)
    for start in range(0, padded, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, padded)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            if column % block_size == 0:
                block = slice(column, column + block_size)
                scale, unit = (found[:, 0] for found in search_scales(w[:, None, block], bits, importance[None, block], scale_type))
                scales[:, column // block_size] = (scale * unit)[:, 0]
            integers = round_to(w[:, column : column + 1] / unit, scale, low, high)
            codes[:, column] = (integers - low)[:, 0].to(torch.uint8)
            error = (w[:, column : column + 1] - integers * scale * unit) / factor[column, column]
            w[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error[:, 0]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return Quantized(pack(codes.view(rows, blocks, block_size), bits), scales)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse of H, float32 [K, K]; an input that is always zero stands alone in it."""
    h = hessian.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.double() + _DAMPING * h.diagonal()[~dead].mean().nan_to_num())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
