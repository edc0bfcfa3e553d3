"""Block-wise weight quantization: pure tensor functions.

One encoding for every consumer: `MatMulNBits`, `QMoE` and `GatherBlockQuantized` of onnxruntime read the same bytes. A
weight [N, K] is cut along K into blocks that share a scale; the last block is padded with zeros where the block does
not divide K, so every width can be quantized. Codes are unsigned, two 4-bit ones a byte, the even one in the low
nibble: w = (code - zero_point) * scale. The zero point is 2^(bits-1), or each block has one of its own, which is a code
too: so a weight of zero stays exactly zero, padding included.

Scales are searched, not only taken from the largest weight: among candidates around it, each refitted by least squares,
the one with the smallest squared error wins. The same idea stands behind the k-quants of llama.cpp (ggml-quants.c,
make_qx_quants; make_qkx2_quants with an offset) and HQQ's first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_CANDIDATES = {4: (0.80, 0.85, 0.90, 0.95, 1.0, 1.05, 1.10), 8: (1.0,)}
_CHUNK_ELEMENTS = 1 << 22
PARTS = ("codes", "scales", "zero_points")
"""Tensors of a quantized weight, as files name them."""


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: codes [N, num_blocks, bytes], scales [N, num_blocks].

    Codes are uint8, scales float32. `zero_points` uint8 [N, ceil(num_blocks * bits / 8)] are packed like codes, each
    row by itself; None is 2^(bits-1) for every block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by field name."""
        tensors = {part: getattr(self, part) for part in PARTS}
        return {part: tensor for part, tensor in tensors.items() if tensor is not None}

    def own_zero_points(self) -> torch.Tensor:
        """The zero points of a weight that has them."""
        assert self.zero_points is not None
        return self.zero_points


def join(parts: Sequence[Quantized], combine: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat) -> Quantized:
    """Weights of one width and kind, stacked by rows.

    Or combined otherwise, as by `torch.stack`.
    """
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    assert len(zero_points) in (0, len(parts)), "some parts have zero points, some not"
    codes, scales = combine([part.codes for part in parts]), combine([part.scales for part in parts])
    return Quantized(codes, scales, combine(zero_points) if zero_points else None)


def is_quantized(bits: int) -> bool:
    """Whether a tensor with these bits is integers and scales."""
    return bits < 16


def num_blocks(width: int, block_size: int) -> int:
    """Blocks along an input dimension of `width`, the last one possibly padded."""
    return math.ceil(width / block_size)


def zero_point_bytes(width: int, bits: int, block_size: int) -> int:
    """Bytes of the zero points of one row."""
    return math.ceil(num_blocks(width, block_size) * bits / 8)


def quantize(
    weight: torch.Tensor,
    bits: int,
    block_size: int,
    importance: torch.Tensor | None = None,
    scale_type: torch.dtype = torch.float32,
    zero_points: bool = False,
) -> Quantized:
    """Quantize a weight [N, K] to 4 or 8 `bits`, in blocks.

    In blocks of `block_size`, each weight by itself. With searched scales and maybe zero points. `importance` [K], not
    negative, weighs the squared errors of the columns, as the mean square of an input does; without it all count alike.
    Scales are rounded to `scale_type`, integers to them; a scale beyond its range is infinite.

    A block of zeros gets scale 0 and 2^(bits-1) as its codes and zero point, so it stays exactly zero.

    Raises:
        ValueError: the weight is not a matrix, or holds NaN or infinite values.
    """
    _check(weight)
    rows, width = weight.shape
    blocks = num_blocks(width, block_size)
    weighing = None
    if importance is not None:
        weighing = torch.zeros(blocks * block_size)
        weighing[:width] = importance
        weighing = weighing.view(blocks, block_size)
    step = max(1, _CHUNK_ELEMENTS // (blocks * block_size))
    parts = []
    for start in range(0, rows, step):
        w = cut(weight[start : start + step], block_size)
        scale, unit, zero = search_scales(w, bits, weighing, scale_type, zero_points)
        parts.append(encode(round_to(w / unit, scale, zero, bits), scale * unit, zero, bits, zero_points))
    return join(parts)


def round_to_nearest(
    weight: torch.Tensor, bits: int, block_size: int, scale_type: torch.dtype = torch.float32, zero_points: bool = False
) -> Quantized:
    """Plain round-to-nearest, for comparison; nothing is searched.

    The scale takes the largest weight of a block [N, K] to the largest integer; with zero points it takes the range of
    the block, zero included, to that of the codes.

    Raises:
        ValueError: the weight is not a matrix, or holds NaN or infinite values.
    """
    _check(weight)
    w = cut(weight, block_size)
    extreme, unit = _extremes(w)
    scale, zero = (
        _spread(w / unit, bits)
        if zero_points
        else (extreme.abs() / unit / (default_zero_point(bits) - 1), torch.tensor(float(default_zero_point(bits))))
    )
    scale = (scale * unit).to(scale_type).to(torch.float32)
    return encode(round_to(w / unit, scale / unit, zero, bits), scale, zero, bits, zero_points)


def _check(weight: torch.Tensor) -> None:
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix of finite values")


def default_zero_point(bits: int) -> int:
    """The zero point of blocks without their own."""
    return 1 << (bits - 1)


def cut(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """A weight [N, K] as zero-padded blocks, float32 [N, num_blocks, block_size]."""
    rows, width = weight.shape
    padded = torch.zeros(rows, num_blocks(width, block_size) * block_size)
    padded[:, :width] = weight
    return padded.view(rows, -1, block_size)


def search_scales(
    w: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    scale_type: torch.dtype = torch.float32,
    zero_points: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, their units and zero points [N, num_blocks, 1].

    For weights [N, num_blocks, block_size]. Integers are round_to(w / unit, scale, zero). They have the smallest
    squared error, weighed by `importance` [num_blocks, block_size]; a block whose importances are all zero is searched
    as if all were one. Units are powers of two near the largest weight: with them no square overflows, and no inverse
    of a scale.
    """
    middle = torch.tensor(float(default_zero_point(bits)))
    extreme, unit = _extremes(w)
    w, extreme = w / unit, extreme / unit
    weighing = torch.ones(()) if importance is None else _normalize(importance)
    # The larger side of the integer range is the negative one: a scale of the opposite sign puts the extreme weight
    # there.
    candidates = [(extreme / -middle * factor, middle) for factor in _CANDIDATES[bits]] + [
        (extreme / (middle - 1), middle)
    ]
    if zero_points:
        spread, zero = _spread(w, bits)
        candidates += [(spread * factor, zero) for factor in _CANDIDATES[bits]]
    best_error, best_scale, best_zero = (
        torch.full_like(extreme, math.inf),
        torch.zeros_like(extreme),
        middle.expand_as(extreme),
    )
    for start, zero in candidates:
        integers = round_to(w, start, zero, bits)
        square = (weighing * integers * integers).sum(-1, keepdim=True)
        scale = torch.where(
            square > 0, (weighing * w * integers).sum(-1, keepdim=True) / square.clamp(min=1e-30), torch.zeros(())
        )
        error = (weighing * (w - round_to(w, scale, zero, bits) * scale).square()).sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale, best_zero = (
            torch.where(better, new, old) for new, old in ((error, best_error), (scale, best_scale), (zero, best_zero))
        )
    if scale_type != torch.float32:
        best_scale = (best_scale * unit).to(scale_type).to(torch.float32) / unit
    return best_scale, unit, best_zero


def _extremes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block's largest weight, and its size's power of two.

    Both are [N, num_blocks, 1].
    """
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    return extreme, torch.ldexp(torch.ones_like(extreme), torch.frexp(extreme).exponent - 1)


def _spread(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that span a block's range and zero.

    Both are [N, num_blocks, 1].

    To that of the codes.
    """
    highest = (1 << bits) - 1
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = high / highest - low / highest
    return scale, torch.where(scale == 0, float(default_zero_point(bits)), (-low / scale).round()).clamp(0, highest)


def _normalize(importance: torch.Tensor) -> torch.Tensor:
    """Importances [num_blocks, block_size] with mean one in each block."""
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean, torch.ones(()))


def encode(integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, zero_points: bool) -> Quantized:
    """Integers [N, num_blocks, block_size], for stored scales and zero points.

    Scales and zero points are [N, num_blocks, 1].
    """
    codes = _pack((integers + zero).to(torch.uint8), bits)
    if not zero_points:
        return Quantized(codes, scale.squeeze(-1))
    rows = zero.squeeze(-1).to(torch.uint8)
    return Quantized(
        codes, scale.squeeze(-1), _pack(torch.nn.functional.pad(rows, (0, rows.shape[1] % 2 if bits == 4 else 0)), bits)
    )


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] as bytes [..., n * bits / 8]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4) if bits == 4 else codes


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [..., n] of bytes [..., n * bits / 8]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2) if bits == 4 else packed


def round_to(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest integers to w / scale that a code holds.

    Beside a zero point; 0 where the scale is 0.
    """
    inverse = torch.where(scale == 0, torch.zeros(()), 1 / scale)
    return (w * inverse).round().clamp(-zero, (1 << bits) - 1 - zero)


def recover(
    weight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, block_size: int
) -> Quantized:
    """Exact integers of a dequantized weight [N, K].

    The scales and zero points are known. See `Quantized`. A float32 w = integer * scale is off by one rounding, and so
    w / scale nearest to that integer. Scales may be smaller than 1 / the largest number.
    """
    scale = scales[..., None].to(torch.float64)
    integers = torch.where(scale == 0, 0.0, cut(weight, block_size) / scale).round().to(torch.float32)
    codes = _pack((integers + _zeros(zero_points, scales.shape[1], bits)).to(torch.uint8), bits)
    return Quantized(codes, scales, zero_points)


def dequantize(quantized: Quantized, width: int, bits: int) -> torch.Tensor:
    """The float32 weight [N, width] that the codes encode."""
    codes = unpack(quantized.codes, bits).to(torch.float32)
    zero = _zeros(quantized.zero_points, codes.shape[1], bits)
    return ((codes - zero) * quantized.scales[..., None]).flatten(1)[:, :width].contiguous()


def _zeros(zero_points: torch.Tensor | None, blocks: int, bits: int) -> torch.Tensor:
    """Unpacked zero points, float32 [N, blocks, 1], or their common value."""
    if zero_points is None:
        return torch.tensor(float(default_zero_point(bits)))
    return unpack(zero_points, bits)[:, :blocks, None].to(torch.float32)
