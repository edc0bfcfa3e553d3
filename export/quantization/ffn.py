"""One FFN or expert: where tensors lie, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import Ffn

_BATCH_TOKENS = 1024
"""Of an FFN at once: what it makes of them fits into a cache."""

RowSpan = tuple[int, int] | None
RowNumbers = tuple[str, RowSpan]
"""A tensor and some of its rows, or all; leading dimensions count as rows."""


@dataclass(frozen=True)
class FfnPlaces:
    """Where an FFN's tensors lie.

    first: its first matrices, in whose rows the gate's come before up's. last: its last matrix.
    first_biases, last_biases: their biases, where it has some: of a stacked expert a row of a tensor.
    up, up_bias: the rows of up alone, and its bias's elements.
    """

    first: tuple[RowNumbers, ...]
    last: RowNumbers
    first_biases: tuple[RowNumbers, ...]
    last_biases: tuple[RowNumbers, ...]
    up: tuple[str, tuple[int, int]]
    up_bias: tuple[str, tuple[int, int]] | None
    is_gated: bool


def find_places(
    family: Architecture, entries: Mapping[str, TensorEntry], ffn: Ffn, layer: int, expert: int | None
) -> FfnPlaces:
    """The places of a layer's FFN, or of one expert."""
    is_stacked = expert is not None and family.is_stacked

    def find(pattern: str) -> RowNumbers:
        name = pattern.format(layer=layer, expert=expert)
        height = entries[name].shape[-2]
        return name, (height * expert, height * (expert + 1)) if expert is not None and is_stacked else None

    def find_biases(*patterns: str | None) -> tuple[RowNumbers, ...]:
        names = [pattern.format(layer=layer, expert=expert) for pattern in patterns if pattern is not None]
        row = (expert, expert + 1) if expert is not None and is_stacked else None
        return tuple((name, row) for name in names if name in entries)

    first = tuple(find(pattern) for pattern in (ffn.gate, ffn.up) if pattern is not None)
    name, rows = first[-1]
    start, stop = rows or (0, math.prod(entries[name].shape[:-1]))
    up = ((start + stop) // 2 if ffn.is_gated and ffn.gate is None else start), stop
    up_biases = find_biases(ffn.up_bias)
    return FfnPlaces(
        first,
        find(ffn.down),
        find_biases(ffn.gate_bias, ffn.up_bias),
        find_biases(ffn.down_bias),
        (name, up),
        (up_biases[0][0], up) if up_biases else None,
        ffn.is_gated,
    )


def compute_inner(
    x: torch.Tensor, first: Sequence[torch.Tensor], bias: torch.Tensor | None, is_gated: bool, activation: str
) -> torch.Tensor:
    """The input of an FFN's last matrix, [tokens, I].

    From its first matrices and their bias, below each other, and its activation's name in transformers.
    """
    both = torch.cat(list(first))
    function: Any = ACT2FN[activation]
    result = x.new_empty(len(x), len(both) // 2 if is_gated else len(both))
    for some, place in zip(x.split(_BATCH_TOKENS), result.split(_BATCH_TOKENS), strict=True):
        given = multiply(some, both, bias)
        if is_gated:
            gate_rows, up_rows = given.chunk(2, dim=-1)
            torch.mul(function(gate_rows), up_rows, out=place)
        else:
            place.copy_(function(given))
    return result


def multiply(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times a transposed matrix [N, K], plus its bias."""
    product = x @ matrix.T
    return product if bias is None else product + bias
