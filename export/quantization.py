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


def is_quantized(bits: int) -> bool:
    """Whether a tensor of so many bits is held as integers and scales."""
    return bits < 16


def num_blocks(width: int, block_size: int) -> int:
    """Blocks along an input dimension of `width`, the last one possibly padded."""
    return math.ceil(width / block_size)


def integer_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize(
    weight: torch.Tensor, bits: int, block_size: int, importance: torch.Tensor | None = None, scale_type: torch.dtype = torch.float32
) -> Quantized:
    """Quantize a weight [N, K] symmetrically to `bits` (4 or 8) in blocks of `block_size`, each weight by itself, with searched scales.

    `importance` [K], not negative, weighs the squared errors of the columns, as the mean square of an input does; without it all count alike.
    Scales are rounded to `scale_type`, integers to them; a scale beyond its range is infinite.

    A block of zeros gets scale 0 and the zero point as its codes, so it stays exactly zero.

    Raises:
        ValueError: the weight is not a matrix, or holds NaN or infinite values.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix of finite values")
    rows, width = weight.shape
    blocks = num_blocks(width, block_size)
    weighing = None
    if importance is not None:
        weighing = torch.zeros(blocks * block_size)
        weighing[:width] = importance
        weighing = weighing.view(blocks, block_size)
    step = max(1, _CHUNK_ELEMENTS // (blocks * block_size))
    parts = [_quantize_rows(weight[start : start + step], bits, block_size, blocks, weighing, scale_type) for start in range(0, rows, step)]
    return Quantized(torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts]))


def round_to_nearest(weight: torch.Tensor, bits: int, block_size: int, scale_type: torch.dtype = torch.float32) -> Quantized:
    """The plain method, to compare with: the scale takes the largest weight of a block [N, K] to the largest integer, and nothing is searched."""
    rows, width = weight.shape
    blocks = num_blocks(width, block_size)
    low, high = integer_range(bits)
    padded = torch.zeros(rows, blocks * block_size)
    padded[:, :width] = weight
    w = padded.view(rows, blocks, block_size)
    scale = (w.abs().amax(-1, keepdim=True) / high).to(scale_type).to(torch.float32)
    return Quantized(pack((round_to(w, scale, low, high) - low).to(torch.uint8), bits), scale.squeeze(-1))


def _quantize_rows(
    weight: torch.Tensor, bits: int, block_size: int, blocks: int, importance: torch.Tensor | None, scale_type: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = weight.shape
    padded = torch.zeros(rows, blocks * block_size)
    padded[:, :width] = weight
    w = padded.view(rows, blocks, block_size)
    low, high = integer_range(bits)
    scale, unit = search_scales(w, bits, importance, scale_type)
    return pack((round_to(w / unit, scale, low, high) - low).to(torch.uint8), bits), (scale * unit).squeeze(-1)


def search_scales(
    w: torch.Tensor, bits: int, importance: torch.Tensor | None = None, scale_type: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and their units [N, num_blocks, 1] for weights [N, num_blocks, block_size]; integers are round_to(w / unit, scale, …).

    They have the smallest squared error, weighed by `importance` [num_blocks, block_size]; a block whose importances are all zero is searched as if
    all were one. Units are powers of two near the largest weight: with them no square overflows, and no inverse of a scale.
    """
    low, high = integer_range(bits)
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    unit = torch.ldexp(torch.ones_like(extreme), torch.frexp(extreme).exponent - 1)
    w, extreme = w / unit, extreme / unit
    weighing = torch.ones(()) if importance is None else _normalize(importance)
    # The larger side of the integer range is the negative one: a scale of the opposite sign puts the extreme weight there.
    candidates = [extreme / low * factor for factor in _CANDIDATES[bits]] + [extreme / high]
    best_error = torch.full_like(extreme, math.inf)
    best_scale = torch.zeros_like(extreme)
    for start in candidates:
        integers = round_to(w, start, low, high)
        square = (weighing * integers * integers).sum(-1, keepdim=True)
        scale = torch.where(square > 0, (weighing * w * integers).sum(-1, keepdim=True) / square.clamp(min=1e-30), torch.zeros(()))
        error = (weighing * (w - round_to(w, scale, low, high) * scale).square()).sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    if scale_type != torch.float32:
        best_scale = (best_scale * unit).to(scale_type).to(torch.float32) / unit
    return best_scale, unit


def _normalize(importance: torch.Tensor) -> torch.Tensor:
    """Importances [num_blocks, block_size] of mean one in each block."""
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean, torch.ones(()))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., block_size] as bytes [..., block_size * bits / 8]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4) if bits == 4 else codes


def round_to(w: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The integers from `low` to `high` nearest to w / scale; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, torch.zeros(()), 1 / scale)
    return (w * inverse).round().clamp(low, high)


def dequantize(quantized: Quantized, width: int, bits: int) -> torch.Tensor:
    """The float32 weight [N, width] that the codes stand for."""
    codes = quantized.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    values = (codes.to(torch.float32) - (1 << (bits - 1))) * quantized.scales[..., None]
    return values.flatten(1)[:, :width].contiguous()
