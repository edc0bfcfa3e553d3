"""Experts made from one FFN: pure tensor functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_BLOCK_ELEMENTS = 1 << 18  # torch makes a float64 copy of what it sums; of so many elements it stays in the cache


@dataclass(frozen=True)
class ElementMoments:
    """Mean and standard deviation of all elements of a weight."""

    mean: float
    std: float


def measure_moments(chunks: Iterable[torch.Tensor]) -> ElementMoments:
    """Mean and standard deviation of a weight that comes in chunks.

    Summed in float64, a block at a time.
    """
    count, total, squares = 0, 0.0, 0.0
    for chunk in chunks:
        for block in chunk.reshape(-1).split(_BLOCK_ELEMENTS):
            exact = block.to(torch.float32)
            count += exact.numel()
            total += float(exact.sum(dtype=torch.float64))
            squares += float(exact.square().sum(dtype=torch.float64))
    if count == 0:
        return ElementMoments(0.0, 0.0)
    mean = total / count
    return ElementMoments(mean, max(squares / count - mean * mean, 0.0) ** 0.5)


def add_noise(weight: torch.Tensor, relative_std: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """Return float32 `weight` plus normal noise of `relative_std` times `std`.

    The deviation of the weight that it is of; same shape.
    A zero `relative_std` returns the very tensor, so copies stay bitwise copies.
    """
    if relative_std == 0:
        return weight
    noise = torch.empty_like(weight).normal_(generator=generator)
    return noise.mul_(relative_std * std).add_(weight)


def choose_neurons(num_neurons: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Which neurons are drawn anew: a mask, bool [num_neurons].

    It has the whole number of neurons that is nearest to `share` of them. One mask serves gate, up and down of an
    expert (Drop-Upcycling, Nakamura et al. 2025, section 3): a neuron is a row of the first two and a column of the
    third, and half a neuron kept would be noise in the other half.
    """
    mask = torch.zeros(num_neurons, dtype=torch.bool)
    mask[torch.randperm(num_neurons, generator=generator)[: round(share * num_neurons)]] = True
    return mask


def redraw_neurons(
    weight: torch.Tensor, mask: torch.Tensor, neuron_axis: int, moments: ElementMoments, generator: torch.Generator
) -> torch.Tensor:
    """Return float32 `weight` [rows, columns] with masked neurons drawn anew.

    Or a bias [rows]. Neurons are rows (axis 0) or columns (axis 1), drawn from N(mean, std) of the whole weight.
    """
    count = int(mask.sum())
    if count == 0:
        return weight
    fresh = weight.clone()
    shape = (count, *weight.shape[1:]) if neuron_axis == 0 else (weight.shape[0], count)
    drawn = torch.empty(shape).normal_(moments.mean, moments.std, generator=generator)
    if neuron_axis == 0:
        fresh[mask] = drawn
    else:
        fresh[:, mask] = drawn
    return fresh


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator by the run's seed and the tensor's name alone.

    So that the order of writing changes nothing.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
