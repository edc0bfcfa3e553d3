"""The crossing: where mixtures overtake the dense model, over tokens and over operations, and what moves it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from domain_arms import TOLD, Arm
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DENSE = "dense"
_LONG, _SHORT = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0), (1 / 4, 1.0)
SERIES: dict[str, tuple[Arm, tuple[float, ...]]] = {
    DENSE: (Arm(num_experts=0), (*_LONG, 4.0)),
    "4 experts, top-2": (Arm(**TOLD), _LONG),
    "4 experts, top-1": (Arm(**TOLD, num_experts_per_tok=1), _LONG),
    "random router": (Arm(balance_coefficient=0.01), _SHORT),
    "8 experts, top-2": (Arm(**TOLD, num_experts=8), _SHORT),
    "8 experts of half a FFN, 2 chosen": (Arm(**TOLD, num_experts=8, granularity=2), _SHORT),
    "experts in the last half of the layers": (Arm(**TOLD, layers="last-half"), _SHORT),
    "noise of 0.1 in the experts": (Arm(**TOLD, noise=0.1), _SHORT),
    "half the rates": (Arm(**TOLD, rate=0.5), _SHORT),
    "twice the rates": (Arm(**TOLD, rate=2.0), _SHORT),
    "dense, half the rates": (Arm(num_experts=0, rate=0.5), _SHORT),
    "dense, twice the rates": (Arm(num_experts=0, rate=2.0), _SHORT),
}
"""Ways to make a model, and for which shares of the benchmark's steps each is trained, every time from the start."""

_STYLES = ("o-", "s-", "^-", "v--", "D--", "P--", "X--", "*--", "<:", ">:", "1:", "2:")


def crossing_arms(names: Sequence[str]) -> dict[tuple[str, float], Arm]:
    """An arm for each length of some series, the dense model's first, since all are compared with it."""
    chosen = {name: SERIES[name] for name in (DENSE, *names)}
    return {
        (name, length): replace(arm, length=length) for name, (arm, lengths) in chosen.items() for length in lengths
    }


def read_dense(points: Sequence[tuple[float, float]], spent: float) -> float | None:
    """The dense model's loss at what was spent, linear in its logarithm; None outside of what was measured."""
    for (before, above), (after, below) in pairwise(points):
        if before <= spent * (1 + 1e-9) and spent <= after * (1 + 1e-9):
            share = math.log(spent / before) / math.log(after / before)
            return (1 - share) * above + share * below
    return None


def print_crossing(results: Mapping[tuple[str, float], dict[str, Any]]) -> None:
    """A row for each model and length: its loss beside the dense model's at equal tokens and at equal operations."""
    dense = {unit: _points(results, DENSE, unit) for unit in ("tokens", "flops")}
    print("| model | tokens | TFLOP | nats | beside dense, equal tokens | beside dense, equal operations |")
    print("|---|--:|--:|--:|--:|--:|")
    for (name, _), result in results.items():
        loss = mean(result["losses"].values())
        gaps = [
            "" if name == DENSE or (found := read_dense(dense[unit], result[unit])) is None else f"{loss - found:+.3f}"
            for unit in dense
        ]
        spent = f"{result['tokens']:,.0f} | {result['flops'] / 1e12:.2f}"
        print(f"| {name} | {spent} | {loss:.3f} | {' | '.join(gaps)} |")


def draw_crossing(results: Mapping[tuple[str, float], dict[str, Any]], file: Path) -> None:
    """Losses against tokens and against operations, one panel each."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, unit, label in ((left, "tokens", "tokens"), (right, "flops", "floating-point operations")):
        for name, style in zip(SERIES, _STYLES, strict=True):
            if points := _points(results, name, unit):
                _plot(axes, points, style, name)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(visible=True, linewidth=0.4)
    left.set_ylabel("held-out loss, nats a token, mean of domains")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _plot(axes: Axes, points: Sequence[tuple[float, float]], style: str, name: str) -> None:
    color = "black" if name == DENSE else None
    axes.plot(*zip(*points, strict=True), style, label=name, color=color, markersize=5, linewidth=1.2)


def _points(results: Mapping[tuple[str, float], dict[str, Any]], name: str, unit: str) -> list[tuple[float, float]]:
    return sorted(
        (result[unit], mean(result["losses"].values())) for (each, _), result in results.items() if each == name
    )
