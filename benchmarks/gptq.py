"""GPTQ's time and loss beside a plain loop over columns.

`python benchmarks/gptq.py [--rounds N]`: the matrices of one layer of experts, in SmolLM2-135M's shape by default, with
inputs that depend on each other. The plain loop holds matrices as they are stored, a row after the other, and takes
them one by one; both know the same moments. Contenders take turns; printed are the medians of their seconds, their
ratio, and the ratio of losses, weighed by the damped moments, which both make small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch

from dense2moe.export.quantization.blockwise import (
    Quantized,
    cut,
    default_zero_point,
    dequantize,
    encode,
    round_to,
    search_scales,
)
from dense2moe.export.quantization.gptq import InputMoments, prepare_moments, quantize_together

_BLOCK = 32
_PASSES = 3


def quantize_plainly(weight: torch.Tensor, moments: InputMoments, bits: int) -> Quantized:
    """GPTQ and coordinate descent as formulas say it: one column after the other, and whatever it changes at once."""
    h, factor = moments.damped, moments.factor
    target = cut(weight, _BLOCK).flatten(1)
    rows, width = target.shape
    w, integers, zero = target.clone(), torch.zeros_like(target), torch.tensor(float(default_zero_point(bits)))
    scales = torch.zeros(rows, width // _BLOCK)
    for column in range(width):
        if column % _BLOCK == 0:
            block = slice(column, column + _BLOCK)
            scale, unit, _ = search_scales(w[:, None, block], bits, moments.importance[None, block])
            scales[:, column // _BLOCK] = (scale * unit)[:, 0, 0]
        own = scales[:, column // _BLOCK]
        integers[:, column] = round_to(w[:, column], own, zero, bits)
        error = (w[:, column] - integers[:, column] * own) / factor[column, column]
        w[:, column:] -= error[:, None] * factor[column, column:]
    for _ in range(_PASSES):
        slope = (target - integers * scales.repeat_interleave(_BLOCK, 1)) @ h
        for number in range(width // _BLOCK):
            block = slice(number * _BLOCK, (number + 1) * _BLOCK)
            bent = integers[:, block] @ h[block]
            square = (bent[:, block] * integers[:, block]).sum(1)
            step = torch.where(
                square > 0, (slope[:, block] * integers[:, block]).sum(1) / square.clamp(min=1e-30), torch.zeros(())
            )
            slope -= step[:, None] * bent
            scales[:, number] += step
        for column in range(width):
            own, old = scales[:, column // _BLOCK], integers[:, column].clone()
            integers[:, column] = round_to(old * own + slope[:, column] / h[column, column], own, zero, bits)
            slope -= ((integers[:, column] - old) * own)[:, None] * h[column]
    return encode(
        integers.view(rows, -1, _BLOCK), scales[..., None], zero.expand(rows, width // _BLOCK, 1), bits, False
    )


def loss(weight: torch.Tensor, moments: InputMoments, quantized: Quantized, bits: int) -> float:
    """The error of the outputs, by the damped moments, in float64."""
    error = (weight - dequantize(quantized, weight.shape[1], bits)).double()
    return float(((error @ moments.damped.double()[: moments.width, : moments.width]) * error).sum())


def draw_moments(width: int, generator: torch.Generator) -> InputMoments:
    """Of inputs that depend on each other and differ in size."""
    inputs = (
        torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5
    )
    inputs *= torch.rand(width, generator=generator) + 0.1
    return prepare_moments(inputs.T @ inputs, _BLOCK)


@click.command()
@click.option("--hidden", default=576, show_default=True, help="Width of the hidden states; 32 must divide it.")
@click.option("--inner", default=1536, show_default=True, help="Width inside of an expert; 32 must divide it.")
@click.option("--experts", default=4, show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(hidden: int, inner: int, experts: int, bits: str, rounds: int) -> None:
    """Race GPTQ against a plain loop on one layer of experts."""
    generator, width = torch.Generator().manual_seed(0), int(bits)
    kinds = {"gate and up": (2 * experts, inner, hidden), "down": (experts, hidden, inner)}
    for kind, (count, height, columns) in kinds.items():
        own = [draw_moments(columns, generator) for _ in range(experts)]
        moments = [own[number * experts // count] for number in range(count)]
        weights = [torch.randn(height, columns, generator=generator) / columns**0.5 for _ in range(count)]

        def together(weights: list[torch.Tensor] = weights, moments: list[InputMoments] = moments) -> list[Quantized]:
            return quantize_together(weights, moments, width, _BLOCK)

        def plainly(weights: list[torch.Tensor] = weights, moments: list[InputMoments] = moments) -> list[Quantized]:
            return [quantize_plainly(weight, of, width) for weight, of in zip(weights, moments, strict=True)]

        contenders: dict[str, Callable[[], list[Quantized]]] = {"GPTQ": together, "plain loop": plainly}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        losses: dict[str, float] = {}
        for _ in range(rounds):
            for name, quantize in contenders.items():
                started = time.perf_counter()
                found = quantize()
                seconds[name].append(time.perf_counter() - started)
                losses[name] = sum(loss(*each, width) for each in zip(weights, moments, found, strict=True))
        ours, plain = (statistics.median(seconds[name]) for name in contenders)
        click.echo(
            f"{kind}: {count} matrices [{height}, {columns}], {bits} bits: {ours:.2f} s, plain loop {plain:.2f} s, "
            f"{plain / ours:.1f} times as fast; "
            f"loss {losses['GPTQ'] / losses['plain loop']:.5f} times the plain loop's"
        )


if __name__ == "__main__":
    main()
