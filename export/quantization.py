"""Block-wise weight quantization: pure tensor functions.

One encoding for every consumer: `MatMulNBits`, `QMoE` and `GatherBlockQuantized` of onnxruntime read the same bytes. A weight [N, K] is cut along
K into blocks that share a scale; the last block is padded with zeros where the block does not divide K, so every width can be quantized. Integers are
stored unsigned with the implicit zero point 2^(bits-1), two 4-bit ones a byte, the even one in the low nibble: w = (code - zero_point) * scale.

Scales are searched, not only taken from the largest weight: among candidates around it, each refitted by least squares, the one with the
smallest squared error wins. The same idea stands behind the k-quants of llama.cpp (ggml-quants.c, make_qx_quants) and HQQ's first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_CANDIDATES = {4: (0.80, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10), 8: (1.0,)}
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: codes uint8 [N, num_blocks, block_size * bits / 8], scales float32 [N, num_blocks]."""

    codes: torch.Tensor
    scales: torch.Tensor


def num_blocks(width: int, block_size: int) -> int:
    """Blocks along an input dimension of `width`, the last one possibly padded."""
    return math.ceil(width / block_size)


def quantize(weight: torch.Tensor, bits: int, block_size: int, scale_type: torch.dtype = torch.float32) -> Quantized:
    """Quantize a weight [N, K] symmetrically to `bits` (4 or 8) in blocks of `block_size`.

    Scales are rounded to `scale_type`, integers to them; a scale beyond its range is infinite.

    A block of zeros gets scale 0 and the zero point as its codes, so it stays exactly zero.

    Raises:
        ValueError: the weight is not a matrix, or holds NaN or infinite values.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix of finite values")
    rows, width = weight.shape
    blocks = num_blocks(width, block_size)
    step = max(1, _CHUNK_ELEMENTS // (blocks * block_size))
    parts = [_quantize_rows(weight[start : start + step], bits, block_size, blocks, scale_type) for start in range(0, rows, step)]
    return Quantized(torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts]))


def _quantize_rows(weight: torch.Tensor, bits: int, block_size: int, blocks: int, scale_type: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = weight.shape
    padded = torch.zeros(rows, blocks * block_size)
    padded[:, :width] = weight
    w = padded.view(rows, blocks, block_size)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    # In units of a power of two near the extreme weight, exactly: no square overflows, and none vanishes.
    unit = torch.ldexp(torch.ones_like(extreme), torch.frexp(extreme).exponent - 1)
    w, extreme = w / unit, extreme / unit
    # The larger side of the integer range is the negative one: a scale of the opposite sign puts the extreme weight there.
    candidates = [extreme / low * factor for factor in _CANDIDATES[bits]] + [extreme / high]
    best_error = torch.full((rows, blocks, 1), math.inf)
    best_scale = torch.zeros(rows, blocks, 1)
    for start in candidates:
        integers = _round(w, start, low, high)
        square = (integers * integers).sum(-1, keepdim=True)
        scale = torch.where(square > 0, (w * integers).sum(-1, keepdim=True) / square.clamp(min=1), torch.zeros(()))
        error = (w - _round(w, scale, low, high) * scale).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    if scale_type != torch.float32:
        best_scale = (best_scale * unit).to(scale_type).to(torch.float32) / unit
    codes = (_round(w, best_scale, low, high) - low).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, (best_scale * unit).squeeze(-1)


def _round(w: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, torch.zeros(()), 1 / scale)
    return (w * inverse).round().clamp(low, high)


def dequantize(quantized: Quantized, width: int, bits: int) -> torch.Tensor:
    """The float32 weight [N, width] that the codes stand for."""
    codes = quantized.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    values = (codes.to(torch.float32) - (1 << (bits - 1))) * quantized.scales[..., None]
    return values.flatten(1)[:, :width].contiguous()
