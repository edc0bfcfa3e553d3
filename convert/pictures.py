"""The report's pictures, as SVG that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from convert.numerals import describe_change, format_agreement, format_count, format_error, format_size, trim_zeros
from convert.summary import Row, find_measured


@dataclass(frozen=True)
class Picture:
    """A drawing with its title, what it shows for those who cannot see it, and what to see in it."""

    title: str
    svg: Markup
    alt: str
    caption: str


_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dense2moe",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.linewidth": 0.7,
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#8a8a8a",
    "ytick.color": "#8a8a8a",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": "#222222",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#767676"
_PALETTE = (_BLUE, "#009e73", _ORANGE, "#cc79a7", "#7a5195", "#b8860b")  # Okabe and Ito's, told apart by the colour-blind too
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INCHES = (4.8, 3.1)  # 346 points: shown at about its own size on a phone, so that the text stays readable there


def draw_pictures(facts: dict[str, Any], rows: Sequence[Row]) -> list[Picture]:
    """Every picture that the facts have the numbers for."""
    agreements = {name: m["finetuned"] for name, v in facts["variants"].items() if (m := find_measured(v))}
    logged = [step for step in facts["finetune"]["history"] if step["layers"]]
    pictures = []
    with matplotlib.rc_context(_RC):
        if any(step["validation_loss"] is not None for step in facts["finetune"]["history"]):
            pictures.append(_training_picture(facts["finetune"]))
        pictures.append(_size_picture(rows))
        if logged:
            pictures += [_load_picture(logged[-1]), _balance_picture(logged)]
        if any(a["routing_agreement"] for a in agreements.values()):
            pictures.append(_routing_picture(agreements))
        if any(a["hidden_error"] for a in agreements.values()):
            pictures.append(_hidden_picture(agreements))
    return pictures


def _training_picture(finetune: dict[str, Any]) -> Picture:
    figure, axes = _axes("tokens", "loss, nats a token")
    ends = {}
    for name, label, color, dash in (("dense continued", "dense control", _ORANGE, (0, (4, 1.5))), ("fine-tuned", "mixture", _BLUE, "solid")):
        steps = [step for step in finetune["history"] if step["model"] == name]
        train = [(s["num_tokens"], s["train_loss"]) for s in steps if s["train_loss"] is not None]
        validation = [(s["num_tokens"], s["validation_loss"]) for s in steps if s["validation_loss"] is not None]
        best = [
            (s["num_tokens"], s["validation_loss"])
            for s in steps
            if s["step"] == finetune["best_steps"].get(name) and s["validation_loss"] is not None
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, linestyle=dash, linewidth=0.9, alpha=0.5, label=f"{label}, train")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=color, linestyle=dash, marker=".", markersize=5, label=f"{label}, validation")
            ends[label] = min(loss for _, loss in validation)
        if best:
            axes.plot(*zip(*best, strict=True), "o", color=color, markerfacecolor="none", markersize=9, markeredgewidth=1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(handlelength=2.2, labelspacing=0.35)
    reached = " and ".join(f"{loss:.3f} for the {label}" for label, loss in reversed(ends.items()))
    return Picture(
        "Training",
        _svg(figure, "training"),
        "Line chart: training and validation loss against tokens.",
        f"The validation loss reached {reached}; a ring marks the weights that were kept.",
    )


def _size_picture(rows: Sequence[Row]) -> Picture:
    figure, axes = _axes("size of the files", "perplexity on held-out text")
    placed = [(row, row.perplexity) for row in rows if row.perplexity is not None and math.isfinite(row.perplexity)]
    for row, perplexity in placed:
        onnx = row.passed is not None
        axes.plot(row.size_bytes, perplexity, "o" if onnx else "s", color=_BLUE if onnx else _GREY, markersize=6, zorder=3)
    axes.set_xscale(_scale([row.size_bytes for row, _ in placed]))
    axes.set_yscale(_scale([perplexity for _, perplexity in placed]))
    _ticks(axes.xaxis, [row.size_bytes for row, _ in placed], lambda value: trim_zeros(format_size(value)))
    _ticks(axes.yaxis, [perplexity for _, perplexity in placed], lambda value: f"{value:.4g}")
    axes.margins(0.16)
    _place_labels(figure, axes, [(row.size_bytes, perplexity, row.name) for row, perplexity in placed])
    exports = {row.name: (row.size_bytes, perplexity) for row, perplexity in placed if row.passed is not None}
    caption = "Down and to the left is better."
    if "ONNX float32" in exports and len(exports) > 1:
        whole_size, whole_perplexity = exports["ONNX float32"]
        name, (size, perplexity) = min(exports.items(), key=lambda item: item[1])
        caption = (
            f"Down and to the left is better: {name} is {whole_size / size:.1f} times smaller than ONNX float32, "
            f"its perplexity {describe_change(perplexity, whole_perplexity)} that one's."
        )
    return Picture("Size and perplexity", _svg(figure, "size"), "Scatter chart: perplexity against file size, a point for each model.", caption)


def _load_picture(step: dict[str, Any]) -> Picture:
    shares = _fair_shares(step)
    names = [layer["number"] for layer in step["layers"]]
    num_layers, num_experts = len(shares), max(map(len, shares))
    figure, axes = _axes("expert", "layer")
    axes.grid(visible=False)
    largest = max(2.0, *(share for layer in shares for share in layer))
    colors = matplotlib.colormaps["PuOr_r"].resampled(41)  # under 50 levels the colour bar stays a drawing
    mesh = axes.pcolormesh(shares, cmap=colors, norm=TwoSlopeNorm(1.0, 0.0, largest), edgecolors="white", linewidth=1.0 if num_experts <= 32 else 0)
    axes.set_ylim(num_layers, 0)
    for axis, labels in ((axes.xaxis, range(num_experts)), (axes.yaxis, names)):
        stride = math.ceil(len(labels) / 16)
        axis.set_ticks([n + 0.5 for n in range(0, len(labels), stride)], [str(label) for label in labels[::stride]])
        axis.set_tick_params(length=0)
    if num_experts <= 8 and num_layers <= 16:
        for y, layer in enumerate(shares):
            for x, share in enumerate(layer):
                dark = share < 0.3 or share > 1 + 0.7 * (largest - 1)
                axes.text(x + 0.5, y + 0.5, f"{share:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label="load ÷ fair share", ticks=[0, 0.5, 1, *_even(largest)], fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")
    bar.ax.grid(visible=False)
    cells = [(share, y, x) for y, layer in enumerate(shares) for x, share in enumerate(layer)]
    (high, y, x), low = max(cells, key=itemgetter(0)), min(cells, key=itemgetter(0))
    return Picture(
        "Expert load",
        _svg(figure, "load"),
        "Heat map: load of each expert in each layer, relative to its fair share.",
        f"At step {step['step']} the busiest expert ({x} of layer {names[y]}) got {high:.2f} times its fair share of the tokens "
        f"and the idlest ({low[2]} of layer {names[low[1]]}) {low[0]:.2f} times.",
    )


def _balance_picture(logged: Sequence[dict[str, Any]]) -> Picture:
    figure, axes = _axes("tokens", "load ÷ fair share")
    tokens = [step["num_tokens"] for step in logged]
    highest = [max(max(layer) for layer in _fair_shares(step)) for step in logged]
    lowest = [min(min(layer) for layer in _fair_shares(step)) for step in logged]
    axes.fill_between(tokens, lowest, highest, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(tokens, highest, color=_BLUE, label="busiest expert of any layer")
    axes.plot(tokens, lowest, color=_BLUE, linestyle=(0, (4, 1.5)), label="idlest expert of any layer")
    axes.axhline(1, color=_GREY, linewidth=0.9)
    axes.set_ylim(0, 1.25 * max(1.6, *highest))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.35)
    return Picture(
        "Load over training",
        _svg(figure, "balance"),
        "Line chart: largest and smallest expert load against tokens, relative to the fair share.",
        f"Experts that share the work evenly all stand at 1: the busiest went from {highest[0]:.2f} to {highest[-1]:.2f}, "
        f"the idlest from {lowest[0]:.2f} to {lowest[-1]:.2f}.",
    )


def _routing_picture(agreements: dict[str, dict[str, Any]]) -> Picture:
    figure, axes = _axes("layer", "routing agreement")
    _layer_lines(axes, {name: a["routing_agreement"] for name, a in agreements.items()})
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    worst, layer, name = min((share, n, name) for name, a in agreements.items() for n, share in enumerate(a["routing_agreement"]))
    return Picture(
        "Routing agreement",
        _svg(figure, "routing"),
        "Line chart: routing agreement by layer, a line for each ONNX variant.",
        f"The lowest is {format_agreement(worst)}, of {name} in layer {layer}; "
        "at 100 % every token visits the experts that the fine-tuned model chooses."
        if worst < 1
        else "Every variant sends every token to the fine-tuned model's experts.",
    )


def _hidden_picture(agreements: dict[str, dict[str, Any]]) -> Picture:
    errors = {name: a["hidden_error"] for name, a in agreements.items() if a["hidden_error"]}
    figure, axes = _axes("layer", "relative error of the hidden state")
    _layer_lines(axes, {name: [value if value > 0 else math.nan for value in layers] for name, layers in errors.items()})
    if any(value > 0 for layers in errors.values() for value in layers):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_error(value).replace(".0e", "e")))
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = ", ".join(f"{format_error(layers[-1])} ({name})" for name, layers in errors.items())
    return Picture(
        "Hidden-state error",
        _svg(figure, "hidden"),
        "Line chart on a logarithmic scale: relative hidden-state error by layer, a line for each ONNX variant.",
        f"After the last layer the hidden states differ from the fine-tuned model's by {ends}.",
    )


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _layer_lines(axes: Axes, lines: dict[str, list[float]]) -> None:
    """A line for each variant over the layers; markers differ, so that equal lines and print in grey can be read."""
    for number, (name, values) in enumerate(lines.items()):
        style = {"color": _PALETTE[number % len(_PALETTE)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(range(len(values)), values, label=name, markersize=5 if len(values) <= 16 else 2.5, **style)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend(labelspacing=0.35, handlelength=2.2)


def _fair_shares(step: dict[str, Any]) -> list[list[float]]:
    """Load of each expert of each layer over what it would be if all were equal."""
    return [[share * len(layer["load"]) for share in layer["load"]] for layer in step["layers"]]


def _even(largest: float) -> list[float]:
    stride = max(1, math.ceil((largest - 1) / 4))
    return [float(tick) for tick in range(1 + stride, math.floor(largest) + 1, stride)]


def _scale(values: Sequence[float]) -> Literal["log", "linear"]:
    """Logarithmic where positive values span more than a factor of three."""
    return "log" if values and max(values) > 3 * min(values) > 0 else "linear"


def _ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Ticks as dense as the span of the values allows, written by `text`."""
    if _scale(values) == "log":
        ratio = max(values) / min(values)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 15 else (1, 2, 5) if ratio < 500 else (1,), numticks=30))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, at the first of some places where it covers nothing else, or else where it covers least."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [Bbox(axes.transData.transform([(x, y), (x, y)])).padded(4) for x, y, _ in points]
    places = [(8, 0), (-8, 0), (0, 10), (0, -10), (7, 9), (-7, 9), (7, -9), (-7, -9), (0, 20), (0, -20), (7, 19), (-7, 19), (7, -19), (-7, -19)]
    for x, y, name in points:
        found = []
        for number, (right, up) in enumerate(places):
            horizontal = "left" if right > 0 else "right" if right < 0 else "center"
            label = axes.annotate(
                name, (x, y), (right, up), textcoords="offset points", ha=horizontal, va="center", fontsize=8.5, in_layout=False, parse_math=False
            )
            bounds = label.get_window_extent()
            covered = sum(bounds.overlaps(other) for other in taken) + 2 * (not frame.containsx(bounds.x0) or not frame.containsx(bounds.x1))
            found.append((covered, number, label, bounds))
        chosen = min(found, key=lambda item: item[:2])
        for candidate in found:
            if candidate is not chosen:
                candidate[2].remove()
        taken.append(chosen[3])


def _svg(figure: Figure, prefix: str) -> Markup:
    """The drawing as an `svg` element to stand in a page: no prolog, metadata or style of its own, and ids that no other picture has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", text, count=1), count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return Markup(text.replace("<svg", '<svg aria-hidden="true"', 1))  # noqa: S704, matplotlib escapes the text in a drawing
