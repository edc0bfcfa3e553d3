"""Pictures of agreement: routing and hidden states by layer, margins and flips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dense2moe.convert.report.numerals import format_agreement, format_error, format_share
from dense2moe.convert.report.pictures.drawing import (
    GREY,
    INCHES,
    MARKERS,
    PALETTE,
    Drawing,
    choose_scale,
    draw_layer_lines,
    open_axes,
    set_ticks,
    write_svg,
)
from dense2moe.export.parity.records import Agreement, MarginBin


def draw_routing(agreements: Mapping[str, Agreement], model: str) -> Drawing:
    """The share of tokens that visit the same experts, by layer."""
    figure, axes = open_axes("layer", "routing agreement")
    draw_layer_lines(axes, {name: a.routing_agreement for name, a in agreements.items()})
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    worst, layer, name = min(
        (share, n, name) for name, a in agreements.items() for n, share in enumerate(a.routing_agreement)
    )
    return (
        write_svg(figure, "routing"),
        "Line chart: routing agreement by layer, a line for each ONNX variant.",
        f"The lowest is {format_agreement(worst)}, of {name} in layer {layer}; "
        f"at 100 % every token visits the experts that the {model} model chooses."
        if worst < 1
        else f"Every variant sends every token to the {model} model's experts.",
    )


def draw_hidden_errors(agreements: Mapping[str, Agreement], model: str) -> Drawing:
    """The relative error of the hidden states, by layer."""
    errors = {name: a.hidden_error for name, a in agreements.items() if a.hidden_error}
    figure, axes = open_axes("layer", "relative error of the hidden state")
    draw_layer_lines(
        axes, {name: [value if value > 0 else math.nan for value in layers] for name, layers in errors.items()}
    )
    if positive := [value for layers in errors.values() for value in layers if math.isfinite(value) and value > 0]:
        axes.set_yscale(choose_scale(positive))
        set_ticks(axes.yaxis, positive, lambda value: format_error(value).replace(".0e", "e"))
    ends = ", ".join(f"{format_error(layers[-1])} ({name})" for name, layers in errors.items())
    return (
        write_svg(figure, "hidden"),
        "Line chart on a logarithmic scale: relative hidden-state error by layer, a line for each ONNX variant.",
        f"After the last layer the hidden states differ from the {model} model's by {ends}.",
    )


def draw_margins(margins: Mapping[str, Sequence[MarginBin]], model: str) -> Drawing:
    """Histogram of router margins, and the share of flipped choices at each."""
    bins = next(iter(margins.values()))
    counts = [found.num_choices for found in bins]
    total = sum(counts)
    flipped = {
        name: [_flips(b) / b.num_choices if b.num_choices else math.nan for b in found]
        for name, found in margins.items()
    }
    figure = Figure(figsize=INCHES, dpi=72, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    places = range(len(bins))
    upper.bar(places, [count / max(total, 1) for count in counts], width=0.92, color=GREY)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    upper.set_ylabel("choices")
    for number, (name, shares) in enumerate(flipped.items()):
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        lower.plot(places, shares, label=name, markersize=4, **style)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    lower.set_ylabel("of them flipped")
    lower.set_ylim(bottom=0)
    lower.legend(labelspacing=0.35, handlelength=2.2)
    lower.xaxis.set_ticks(list(places), [_margin(found) for found in bins], fontsize=7.5)
    lower.set_xlabel("margin of the reference's choice, router logits or biased scores")
    for axes in (upper, lower):
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    num_flips = {name: sum(map(_flips, found)) for name, found in margins.items()}
    name = max(num_flips, key=lambda n: num_flips[n])
    if not 0.5 <= num_flips[name] < math.inf:
        caption = f"Of {total:,} choices of experts none came out otherwise than the {model} model's."
    else:
        narrow = sum(map(_flips, margins[name][: len(bins) // 2]))
        caption = (
            f"A narrow margin is nearly a tie, and there routing flips: of the {round(num_flips[name]):,} flips of "
            f"{name} in {total:,} choices "
            f"{format_share(narrow / num_flips[name])} had a margin below {_number(bins[len(bins) // 2].least)}."
        )
    return (
        write_svg(figure, "margins"),
        f"A histogram of the {model} model's margins, and below it for each ONNX variant the share of choices of "
        "each margin that differ.",
        caption,
    )


def _flips(found: MarginBin) -> float:
    """Flipped choices of a bin; a bin without choices has no agreement."""
    return (1 - found.agreement) * found.num_choices if found.num_choices and found.agreement is not None else 0.0


def _margin(found: MarginBin) -> str:
    if found.below is None:
        return f"≥ {_number(found.least)}"
    return f"< {_number(found.below)}" if found.least == 0 else f"{_number(found.least)}–\n{_number(found.below)}"


def _number(value: float) -> str:
    return f"{value:g}" if value == 0 or value >= 1e-3 else format_error(value).replace(".0e", "e")
