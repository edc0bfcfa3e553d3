"""Pictures of training: losses, balance of load, experts coming apart, routers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dense2moe.convert.report.numerals import format_error, format_operations
from dense2moe.convert.report.pictures.drawing import (
    BLUE,
    GREEN,
    GREY,
    INCHES,
    ORANGE,
    Drawing,
    draw_layer_band,
    fair_shares,
    find_phase_starts,
    mark_phases,
    mark_tokens,
    open_axes,
    write_svg,
)
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.history import ModelName, Step

_TRAINED: tuple[tuple[ModelName, str, str, Any], ...] = (
    ("fine-tuned", "mixture", BLUE, "solid"),
    ("dense continued", "dense, same tokens", ORANGE, (0, (4, 1.5))),
    ("dense, same FLOPs", "dense, same FLOPs", GREEN, (0, (5, 1.5, 1, 1.5))),
)


def draw_training(finetune: FinetuneFacts) -> Drawing:
    """Losses of the mixture and of the controls against tokens."""
    figure, axes = open_axes("tokens", "loss, nats a token")
    ends: list[str] = []
    drawn: list[Line2D] = []
    marked: set[int] = set()
    for name, label, color, dash in _TRAINED:
        steps = [step for step in finetune.history if step.model == name]
        train = [(s.num_tokens, s.train_loss) for s in steps if s.train_loss is not None]
        validation = [(s.num_tokens, s.validation_loss) for s in steps if s.validation_loss is not None]
        best = [
            (s.num_tokens, s.validation_loss)
            for s in steps
            if s.step == finetune.best_steps.get(name) and s.validation_loss is not None
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, linestyle=dash, linewidth=0.7, alpha=0.45)
        if validation:
            axes.plot(*zip(*validation, strict=True), color=color, linestyle=dash, marker=".", markersize=5)
            drawn.append(Line2D([], [], color=color, linestyle=dash, marker=".", markersize=5, label=label))
            ends.append(
                f"{min(loss for _, loss in validation):.3f} for the {label.replace('dense,', 'dense model with the')}"
            )
        if best:
            axes.plot(
                *zip(*best, strict=True), "o", color=color, markerfacecolor="none", markersize=9, markeredgewidth=1.2
            )
        starts = [tokens for tokens in find_phase_starts(steps) if tokens not in marked]
        mark_phases(axes, starts, color if marked else GREY)
        marked.update(starts)
    drawn.append(Line2D([], [], color=GREY, linewidth=0.7, label="the same, training loss"))
    mark_tokens(axes)
    figure.legend(
        handles=drawn, loc="outside upper left", ncols=2, handlelength=2.6, labelspacing=0.35, columnspacing=1.4
    )
    reached = f"{', '.join(ends[:-1])} and {ends[-1]}" if len(ends) > 1 else ends[0]
    phases = "; a thin vertical line is where a phase begins, grey where it is the mixture's" if marked else ""
    if finetune.spent.num_tokens:
        phases += "; the mixture's curve begins behind the tokens of its branches"
    return (
        write_svg(figure, "training"),
        "Line chart: training and validation loss against tokens.",
        f"The validation loss reached {reached}; a ring marks the weights that were kept{phases}.",
    )


def draw_compute(finetune: FinetuneFacts) -> Drawing:
    """Validation losses of the mixture and of the controls against operations."""
    figure, axes = open_axes("operations of training", "validation loss, nats a token")
    for name, label, color, dash in _TRAINED:
        steps = [step for step in finetune.history if step.model == name]
        points = [(s.flops, s.validation_loss) for s in steps if s.flops is not None and s.validation_loss is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker=".", markersize=5, label=label)
    crossing = finetune.crossings.get("dense, same FLOPs")
    at = crossing.at if crossing is not None else None
    if at is not None:
        axes.axvline(at, color=GREY, linewidth=0.9, zorder=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_operations(value) if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(loc="upper right", handlelength=2.6, labelspacing=0.35)
    if crossing is None:
        told = "No dense model was trained with as many operations as the mixture"
    elif at is None:
        told = f"The mixture ends {crossing.last_gap:.3f} nats behind the dense model with as many operations"
    else:
        told = f"From {format_operations(at)} on, the grey line, the mixture is ahead of the dense model with as many"
    return (
        write_svg(figure, "compute"),
        "Line chart: validation loss against floating-point operations.",
        f"{told}{'; operations of branches are counted' if finetune.spent.flops else ''}.",
    )


def draw_balance(logged: Sequence[Step]) -> Drawing:
    """The busiest and the idlest expert against tokens."""
    figure, axes = open_axes("tokens", "load ÷ fair share")
    tokens = [step.num_tokens for step in logged]
    shares = [fair_shares([layer.load for layer in step.layers]) for step in logged]
    highest = [max(map(max, layers)) for layers in shares]
    lowest = [min(map(min, layers)) for layers in shares]
    axes.fill_between(tokens, lowest, highest, color=BLUE, alpha=0.12, linewidth=0)
    axes.plot(tokens, highest, color=BLUE, label="busiest expert of any layer")
    axes.plot(tokens, lowest, color=BLUE, linestyle=(0, (4, 1.5)), label="idlest expert of any layer")
    axes.axhline(1, color=GREY, linewidth=0.9)
    axes.set_ylim(0, 1.25 * max(1.6, *highest))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    mark_tokens(axes)
    mark_phases(axes, find_phase_starts(logged), GREY)
    axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.35)
    return (
        write_svg(figure, "balance"),
        "Line chart: largest and smallest expert load against tokens, relative to the fair share.",
        f"Experts that share the work evenly all stand at 1: the busiest went from {highest[0]:.2f} to "
        f"{highest[-1]:.2f}, "
        f"the idlest from {lowest[0]:.2f} to {lowest[-1]:.2f}.",
    )


def draw_distances(logged: Sequence[Step]) -> Drawing:
    """How far apart the weights of a layer's experts are, against tokens."""
    figure, axes = open_axes("tokens", "1 − cosine of two experts")
    distances = [[max(0.0, 1 - layer.cosine) for layer in step.layers] for step in logged]
    draw_layer_band(axes, logged, distances)
    axes.set_ylim(0, 1.1 * _largest(distances, 1e-7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _distance(value)))
    furthest, layer = max((value, step.number) for value, step in zip(distances[-1], logged[-1].layers, strict=True))
    return (
        write_svg(figure, "distance"),
        "Line chart: distance between the weights of a layer's experts against tokens, the mean over layers with "
        "their range.",
        "At 0 a layer's experts are copies, at 1 they have nothing in common: the mean over layers, with the range "
        "of all, went from "
        f"{_distance(fmean(distances[0]))} to {_distance(fmean(distances[-1]))}, furthest in layer {layer} "
        f"({_distance(furthest)}).",
    )


def _largest(values: Sequence[Sequence[float]], least: float) -> float:
    """The largest finite number, at least `least`: where an axis ends."""
    return max([least, *(value for found in values for value in found if math.isfinite(value))])


def _distance(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else format_error(value)


def draw_routers(logged: Sequence[Step]) -> Drawing:
    """The routers' entropy and margin against tokens."""
    figure = Figure(figsize=INCHES, dpi=72, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    entropies = [[layer.entropy / math.log(len(layer.load)) for layer in step.layers] for step in logged]
    margins = [[layer.margin for layer in step.layers] for step in logged]
    for axes, values, label in ((upper, entropies, "entropy ÷ log n"), (lower, margins, "margin")):
        draw_layer_band(axes, logged, values)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    upper.set_ylim(0, 1.05)
    lower.set_ylim(0, 1.15 * _largest(margins, 1e-3))
    lower.set_xlabel("tokens")
    figure.align_ylabels()
    return (
        write_svg(figure, "router"),
        "Two line charts against tokens, the mean over layers with their range: the routers' entropy relative to its "
        "largest, and their margin.",
        "A router that knows its experts has an entropy well below 1, which is chance, and a wide margin between the "
        "last expert chosen and the "
        f"next: over all layers the mean entropy went from {fmean(entropies[0]):.2f} to {fmean(entropies[-1]):.2f}, "
        f"the margin from {fmean(margins[0]):.2f} to {fmean(margins[-1]):.2f}.",
    )
