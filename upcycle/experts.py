"""Experts made from one FFN: pure tensor functions."""

from __future__ import annotations

import hashlib

import torch


def add_noise(weight: torch.Tensor, relative_std: float, generator: torch.Generator) -> torch.Tensor:
    """Return `weight` plus normal noise of `relative_std` times the weight's own standard deviation; same shape and dtype.

    A zero `relative_std` returns the very tensor, so copies stay bitwise copies. Drawn and added in float32, then rounded to the weight's dtype.
    """
    if relative_std == 0:
        return weight
    exact = weight.to(torch.float32)
    noise = torch.empty_like(exact).normal_(generator=generator)
    scale = relative_std * float(exact.std(correction=0))
    return noise.mul_(scale).add_(exact).to(weight.dtype)


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the run's seed and the tensor's name alone, so that the order of writing changes nothing."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
