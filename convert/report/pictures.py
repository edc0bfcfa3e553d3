"""The report's pictures, as SVG that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any, Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from dense2moe.convert.report.numerals import (
    describe_change,
    format_agreement,
    format_count,
    format_error,
    format_rounded,
    format_share,
    format_size,
    trim_zeros,
)
from dense2moe.convert.report.summary import Row, exported_model, find_measured


@dataclass(frozen=True)
class Picture:
    """A drawing with its title, what it shows for those who cannot see it, and what to see in it."""

    title: str
    svg: Markup
    alt: str
    caption: str


_Drawing = tuple[Markup, str, str]  # what a picture has beside its title
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dense2moe",
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "font.size": 9,
    "axes.facecolor": "none",
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
_BLUE, _GREEN, _ORANGE, _GREY = "#0072b2", "#009e73", "#d55e00", "#767676"
# Okabe and Ito's, told apart by the colour-blind too
_PALETTE = (
    _BLUE,
    _GREEN,
    _ORANGE,
    "#cc79a7",
    "#7a5195",
    "#b8860b",
)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INCHES = (4.8, 3.1)  # 346 points: shown at about its own size on a phone, so that the text stays readable there
_TRAINED: tuple[tuple[str, str, str, Any], ...] = (
    ("fine-tuned", "mixture", _BLUE, "solid"),
    ("dense continued", "dense, equal tokens", _ORANGE, (0, (4, 1.5))),
    ("dense, equal time", "dense, equal time", _GREEN, (0, (5, 1.5, 1, 1.5))),
)


def draw_pictures(facts: dict[str, Any], rows: Sequence[Row]) -> list[Picture]:
    """Every picture that the facts have the numbers for."""
    return [draw() for draw in plan_pictures(facts, rows).values()]


def plan_pictures(facts: dict[str, Any], rows: Sequence[Row]) -> dict[str, Callable[[], Picture]]:
    """By its title, what draws each picture that the facts have the numbers for."""
    agreements = {name: m["finetuned"] for name, v in facts["variants"].items() if (m := find_measured(v))}
    finetune = facts["finetune"]
    model = exported_model(facts)
    logged = [step for step in finetune["history"] if step["layers"]]
    plan: dict[str, Callable[[], _Drawing]] = {}
    if any(step["validation_loss"] is not None for step in finetune["history"]):
        plan["Training"] = partial(_training_picture, finetune)
    plan["Size and perplexity"] = partial(_size_picture, rows)
    for name, variant in facts["variants"].items():
        if search := variant["quantize"].get("search"):
            plan[f"Search of bits, {name}"] = partial(_search_picture, name, search)
    if logged:
        plan["Expert load"] = partial(_load_picture, logged[-1])
        plan["Load over training"] = partial(_balance_picture, logged)
    if finetune["domains"]:
        plan["Specialization"] = partial(_specialization_picture, finetune["domains"], finetune["sparse_layers"])
    if logged and all(len(layer["load"]) > 1 for step in logged for layer in step["layers"]):
        plan["Experts coming apart"] = partial(_distance_picture, logged)
        plan["Routers over training"] = partial(_router_picture, logged)
    if any(a["routing_agreement"] for a in agreements.values()):
        plan["Routing agreement"] = partial(_routing_picture, agreements, model)
    if any(a["hidden_error"] for a in agreements.values()):
        plan["Hidden-state error"] = partial(_hidden_picture, agreements, model)
    if margins := {name: a["margins"] for name, a in agreements.items() if a.get("margins")}:
        plan["Router margins and flips"] = partial(_margin_picture, margins, model)
    plan["Tokens per second"] = partial(_speed_picture, rows, model)
    return {title: partial(_draw, title, drawing) for title, drawing in plan.items()}


def _draw(title: str, drawing: Callable[[], _Drawing]) -> Picture:
    with matplotlib.rc_context(_RC):
        return Picture(title, *drawing())


def _training_picture(finetune: dict[str, Any]) -> _Drawing:
    figure, axes = _axes("tokens", "loss, nats a token")
    ends: list[str] = []
    drawn: list[Line2D] = []
    marked: set[int] = set()
    for name, label, color, dash in _TRAINED:
        steps = [step for step in finetune["history"] if step["model"] == name]
        train = [(s["num_tokens"], s["train_loss"]) for s in steps if s["train_loss"] is not None]
        validation = [(s["num_tokens"], s["validation_loss"]) for s in steps if s["validation_loss"] is not None]
        best = [
            (s["num_tokens"], s["validation_loss"])
            for s in steps
            if s["step"] == finetune["best_steps"].get(name) and s["validation_loss"] is not None
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, linestyle=dash, linewidth=0.7, alpha=0.45)
        if validation:
            axes.plot(*zip(*validation, strict=True), color=color, linestyle=dash, marker=".", markersize=5)
            drawn.append(Line2D([], [], color=color, linestyle=dash, marker=".", markersize=5, label=label))
            ends.append(f"{min(loss for _, loss in validation):.3f} for the {label.replace(',', ' model at')}")
        if best:
            axes.plot(
                *zip(*best, strict=True), "o", color=color, markerfacecolor="none", markersize=9, markeredgewidth=1.2
            )
        starts = [tokens for tokens in _stage_starts(steps) if tokens not in marked]
        _mark_stages(axes, starts, color if marked else _GREY)
        marked.update(starts)
    drawn.append(Line2D([], [], color=_GREY, linewidth=0.7, label="the same, training loss"))
    _token_axis(axes)
    figure.legend(
        handles=drawn, loc="outside upper left", ncols=2, handlelength=2.6, labelspacing=0.35, columnspacing=1.4
    )
    reached = f"{', '.join(ends[:-1])} and {ends[-1]}" if len(ends) > 1 else ends[0]
    stages = "; a thin vertical line is where a stage begins, grey where it is the mixture's" if marked else ""
    return (
        _svg(figure, "training"),
        "Line chart: training and validation loss against tokens.",
        f"The validation loss reached {reached}; a ring marks the weights that were kept{stages}.",
    )


def _size_picture(rows: Sequence[Row]) -> _Drawing:
    figure, axes = _axes("size of the files", "perplexity on held-out text")
    placed = [(row, row.perplexity) for row in rows if row.perplexity is not None and math.isfinite(row.perplexity)]
    for row, perplexity in placed:
        onnx = row.passed is not None
        axes.plot(
            row.size_bytes, perplexity, "o" if onnx else "s", color=_BLUE if onnx else _GREY, markersize=6, zorder=3
        )
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
    return _svg(figure, "size"), "Scatter chart: perplexity against file size, a point for each model.", caption


def _search_picture(variant: str, search: dict[str, Any]) -> _Drawing:
    points = [point for point in search["points"] if math.isfinite(point["perplexity"])]
    chosen = next((point for point in points if point["chosen"]), None)
    sizes, perplexities = [point["package_bytes"] for point in points], [point["perplexity"] for point in points]
    front, best = [], math.inf
    for point in sorted(points, key=lambda found: (found["package_bytes"], found["perplexity"])):
        if point["perplexity"] < best:
            front.append(point)
            best = point["perplexity"]
    figure, axes = _axes("size of the files", "perplexity")
    axes.plot(sizes, perplexities, "o", color=_GREY, markersize=4, alpha=0.6)
    axes.plot(
        [p["package_bytes"] for p in front], [p["perplexity"] for p in front], color=_BLUE, marker="o", markersize=4
    )
    axes.axhline(search["reference_perplexity"], color=_GREY, linewidth=0.9, linestyle=(0, (4, 1.5)))
    axes.set_xscale(_scale(sizes))
    axes.set_yscale(_scale(perplexities))
    _ticks(axes.xaxis, sizes, lambda value: trim_zeros(format_size(value)))
    _ticks(axes.yaxis, perplexities, lambda value: f"{value:.4g}")
    axes.margins(0.12)
    caption = (
        f"Of {len(points)} mixtures of bits none on the line is beaten in both; none met the limit: {search['limit']}."
    )
    if chosen is not None:
        axes.plot(
            chosen["package_bytes"],
            chosen["perplexity"],
            "o",
            color=_ORANGE,
            markerfacecolor="none",
            markersize=11,
            markeredgewidth=1.6,
        )
        _place_labels(figure, axes, [(chosen["package_bytes"], chosen["perplexity"], chosen["label"])])
        change = describe_change(chosen["perplexity"], search["reference_perplexity"])
        caption = (
            f"Of {len(points)} mixtures of bits those on the line are beaten by none in both size and perplexity; "
            "the ring is the one chosen, "
            f"{format_size(chosen['package_bytes'])}, its perplexity {change} the reference's (dashed); the limit: "
            f"{search['limit']}."
        )
    return (
        _svg(figure, f"search-{re.sub('[^a-z0-9]', '-', variant)}"),
        "Scatter chart: perplexity against file size of every mixture of bits that was tried, with the best of each "
        "size joined by a line.",
        caption,
    )


def _load_picture(step: dict[str, Any]) -> _Drawing:
    shares = _fair_shares([layer["load"] for layer in step["layers"]])
    names = [layer["number"] for layer in step["layers"]]
    figure, _ = _heat_map(shares, names, max(map(len, shares)))
    cells = [(share, y, x) for y, layer in enumerate(shares) for x, share in enumerate(layer)]
    (high, y, x), low = max(cells, key=itemgetter(0)), min(cells, key=itemgetter(0))
    return (
        _svg(figure, "load"),
        "Heat map: load of each expert in each layer, relative to its fair share.",
        f"At step {step['step']} the busiest expert ({x} of layer {names[y]}) got {high:.2f} times its fair share of "
        "the tokens "
        f"and the idlest ({low[2]} of layer {names[low[1]]}) {low[0]:.2f} times.",
    )


def _specialization_picture(domains: dict[str, Any], names: Sequence[int]) -> _Drawing:
    shares = {domain: _fair_shares(loads) for domain, loads in domains["loads"].items()}
    num_experts = len(next(iter(shares.values()))[0])
    figure, axes = _heat_map([list(chain(*layer)) for layer in zip(*shares.values(), strict=True)], names, num_experts)
    room = 46 // len(shares)  # letters that fit above a domain's columns
    for place, domain in enumerate(shares):
        text = domain if len(domain) <= room else f"{domain[: max(1, room - 1)]}…"
        left, right = (
            _column_edge(n, num_experts, len(shares)) for n in (place * num_experts, (place + 1) * num_experts - 1)
        )
        axes.text(
            (left + right + 1) / 2,
            1.02,
            text,
            ha="center",
            va="bottom",
            transform=axes.get_xaxis_transform(),
            parse_math=False,
        )
    between, within = fmean(domains["between"]), fmean(domains["within"])
    taken = {
        (y, x): [(layers[y][x], domain) for domain, layers in shares.items()]
        for y in range(len(names))
        for x in range(num_experts)
    }
    (layer, expert), furthest = max(taken.items(), key=lambda item: max(item[1])[0] - min(item[1])[0])
    (most, here), (least, there) = max(furthest), min(furthest)
    finding = "know" if between > 2 * within else "hardly know" if between > within else "do not know"
    return (
        _svg(figure, "specialization"),
        "Heat map: load of each expert in each layer, relative to its fair share, side by side for each domain of "
        "the held-out text.",
        f"From one domain to another {format_share(between)} of a layer's load moves to other experts, from one half "
        "of a domain to the other "
        f"{format_share(within)}, so the experts {finding} the domains; the greatest difference is expert {expert} "
        f"of layer {names[layer]}, "
        f"with {most:.2f} times its fair share of {here} and {least:.2f} times of {there}.",
    )


def _heat_map(shares: Sequence[Sequence[float]], names: Sequence[int], num_experts: int) -> tuple[Figure, Axes]:
    """Shares of each layer (row) in columns that count through the experts, once or several times with a gap between.

    1 is fair.
    """
    num_layers, num_columns = len(shares), max(map(len, shares))
    edges = [_column_edge(n, num_experts, num_columns // num_experts) for n in range(num_columns)]
    sides = sorted({*edges, *(edge + 1 for edge in edges)})
    cells = [[math.nan if side not in edges else layer[edges.index(side)] for side in sides[:-1]] for layer in shares]
    figure, axes = _axes("expert", "layer")
    axes.grid(visible=False)
    largest = max(2.0, *(share for layer in shares for share in layer))
    colors = matplotlib.colormaps["PuOr_r"].resampled(41)  # under 50 levels the colour bar stays a drawing
    norm, line = TwoSlopeNorm(1.0, 0.0, largest), 1.0 if num_columns <= 32 else 0
    mesh = axes.pcolormesh(
        sides, range(num_layers + 1), cells, cmap=colors, norm=norm, edgecolors="white", linewidth=line
    )
    axes.set_ylim(num_layers, 0)
    across = math.ceil(num_experts / max(1, 16 * num_experts // num_columns))
    columns = [n for n in range(num_columns) if n % num_experts % across == 0]
    down = math.ceil(num_layers / 16)
    axes.xaxis.set_ticks([edges[n] + 0.5 for n in columns], [str(n % num_experts) for n in columns])
    axes.yaxis.set_ticks([n + 0.5 for n in range(0, num_layers, down)], [str(name) for name in names[::down]])
    axes.tick_params(length=0)
    if num_columns <= 12 and num_layers <= 16:
        for y, layer in enumerate(shares):
            for x, share in enumerate(layer):
                color = "white" if share < 0.3 or share > 1 + 0.7 * (largest - 1) else "#222222"
                axes.text(
                    edges[x] + 0.5,
                    y + 0.5,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8 if num_columns <= 8 else 7,
                    color=color,
                )
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        mesh, ax=axes, label="load ÷ fair share", ticks=[0, 0.5, 1, *_even(largest)], fraction=0.05, pad=0.03
    )
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")
    bar.ax.grid(visible=False)
    return figure, axes


def _column_edge(column: int, num_experts: int, num_groups: int) -> float:
    """Where a column of a heat map begins, when columns are one wide and a gap parts the groups of experts."""
    return column + column // num_experts * num_experts * num_groups / 64


def _balance_picture(logged: Sequence[dict[str, Any]]) -> _Drawing:
    figure, axes = _axes("tokens", "load ÷ fair share")
    tokens = [step["num_tokens"] for step in logged]
    shares = [_fair_shares([layer["load"] for layer in step["layers"]]) for step in logged]
    highest = [max(map(max, layers)) for layers in shares]
    lowest = [min(map(min, layers)) for layers in shares]
    axes.fill_between(tokens, lowest, highest, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(tokens, highest, color=_BLUE, label="busiest expert of any layer")
    axes.plot(tokens, lowest, color=_BLUE, linestyle=(0, (4, 1.5)), label="idlest expert of any layer")
    axes.axhline(1, color=_GREY, linewidth=0.9)
    axes.set_ylim(0, 1.25 * max(1.6, *highest))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    _token_axis(axes)
    _mark_stages(axes, _stage_starts(logged), _GREY)
    axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.35)
    return (
        _svg(figure, "balance"),
        "Line chart: largest and smallest expert load against tokens, relative to the fair share.",
        f"Experts that share the work evenly all stand at 1: the busiest went from {highest[0]:.2f} to "
        f"{highest[-1]:.2f}, "
        f"the idlest from {lowest[0]:.2f} to {lowest[-1]:.2f}.",
    )


def _distance_picture(logged: Sequence[dict[str, Any]]) -> _Drawing:
    figure, axes = _axes("tokens", "1 − cosine of two experts")
    distances = [[max(0.0, 1 - layer["cosine"]) for layer in step["layers"]] for step in logged]
    _layer_band(axes, logged, distances)
    axes.set_ylim(0, 1.1 * _largest(distances, 1e-7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _distance(value)))
    furthest, layer = max(
        (value, step["number"]) for value, step in zip(distances[-1], logged[-1]["layers"], strict=True)
    )
    return (
        _svg(figure, "distance"),
        "Line chart: distance between the weights of a layer's experts against tokens, the mean over layers with "
        "their range.",
        "At 0 a layer's experts are copies, at 1 they have nothing in common: the mean over layers, with the range "
        "of all, went from "
        f"{_distance(fmean(distances[0]))} to {_distance(fmean(distances[-1]))}, furthest in layer {layer} "
        f"({_distance(furthest)}).",
    )


def _largest(values: Sequence[Sequence[float]], least: float) -> float:
    """The largest finite number of all, and at least `least`: where an axis may end."""
    return max([least, *(value for found in values for value in found if math.isfinite(value))])


def _distance(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else format_error(value)


def _router_picture(logged: Sequence[dict[str, Any]]) -> _Drawing:
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    entropies = [[layer["entropy"] / math.log(len(layer["load"])) for layer in step["layers"]] for step in logged]
    margins = [[layer["margin"] for layer in step["layers"]] for step in logged]
    for axes, values, label in ((upper, entropies, "entropy ÷ log n"), (lower, margins, "margin")):
        _layer_band(axes, logged, values)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    upper.set_ylim(0, 1.05)
    lower.set_ylim(0, 1.15 * _largest(margins, 1e-3))
    lower.set_xlabel("tokens")
    figure.align_ylabels()
    return (
        _svg(figure, "router"),
        "Two line charts against tokens, the mean over layers with their range: the routers' entropy relative to its "
        "largest, and their margin.",
        "A router that knows its experts has an entropy well below 1, which is chance, and a wide margin between the "
        "last expert chosen and the "
        f"next: over all layers the mean entropy went from {fmean(entropies[0]):.2f} to {fmean(entropies[-1]):.2f}, "
        f"the margin from {fmean(margins[0]):.2f} to {fmean(margins[-1]):.2f}.",
    )


def _routing_picture(agreements: dict[str, dict[str, Any]], model: str) -> _Drawing:
    figure, axes = _axes("layer", "routing agreement")
    _layer_lines(axes, {name: a["routing_agreement"] for name, a in agreements.items()})
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    worst, layer, name = min(
        (share, n, name) for name, a in agreements.items() for n, share in enumerate(a["routing_agreement"])
    )
    return (
        _svg(figure, "routing"),
        "Line chart: routing agreement by layer, a line for each ONNX variant.",
        f"The lowest is {format_agreement(worst)}, of {name} in layer {layer}; "
        f"at 100 % every token visits the experts that the {model} model chooses."
        if worst < 1
        else f"Every variant sends every token to the {model} model's experts.",
    )


def _hidden_picture(agreements: dict[str, dict[str, Any]], model: str) -> _Drawing:
    errors = {name: a["hidden_error"] for name, a in agreements.items() if a["hidden_error"]}
    figure, axes = _axes("layer", "relative error of the hidden state")
    _layer_lines(
        axes, {name: [value if value > 0 else math.nan for value in layers] for name, layers in errors.items()}
    )
    if positive := [value for layers in errors.values() for value in layers if math.isfinite(value) and value > 0]:
        axes.set_yscale(_scale(positive))
        _ticks(axes.yaxis, positive, lambda value: format_error(value).replace(".0e", "e"))
    ends = ", ".join(f"{format_error(layers[-1])} ({name})" for name, layers in errors.items())
    return (
        _svg(figure, "hidden"),
        "Line chart on a logarithmic scale: relative hidden-state error by layer, a line for each ONNX variant.",
        f"After the last layer the hidden states differ from the {model} model's by {ends}.",
    )


def _margin_picture(margins: dict[str, list[dict[str, Any]]], model: str) -> _Drawing:
    """How wide the reference's margins are, and of each width the share of choices that came out otherwise."""
    bins = next(iter(margins.values()))
    counts = [found["num_choices"] for found in bins]
    total = sum(counts)
    flipped = {
        name: [_flips(b) / b["num_choices"] if b["num_choices"] else math.nan for b in found]
        for name, found in margins.items()
    }
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    places = range(len(bins))
    upper.bar(places, [count / max(total, 1) for count in counts], width=0.92, color=_GREY)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    upper.set_ylabel("choices")
    for number, (name, shares) in enumerate(flipped.items()):
        style = {"color": _PALETTE[number % len(_PALETTE)], "marker": _MARKERS[number % len(_MARKERS)]}
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
            f"{format_share(narrow / num_flips[name])} had a margin below {_number(bins[len(bins) // 2]['least'])}."
        )
    return (
        _svg(figure, "margins"),
        f"A histogram of the {model} model's margins, and below it for each ONNX variant the share of choices of "
        "each margin that differ.",
        caption,
    )


def _flips(found: dict[str, Any]) -> float:
    """Choices of a width of margin that came out otherwise; a width without choices has no agreement."""
    return float((1 - found["agreement"]) * found["num_choices"]) if found["num_choices"] else 0.0


def _margin(found: dict[str, Any]) -> str:
    if found["below"] is None:
        return f"≥ {_number(found['least'])}"
    return (
        f"< {_number(found['below'])}"
        if found["least"] == 0
        else f"{_number(found['least'])}–\n{_number(found['below'])}"
    )


def _number(value: float) -> str:
    return f"{value:g}" if value == 0 or value >= 1e-3 else format_error(value).replace(".0e", "e")


def _speed_picture(rows: Sequence[Row], model: str) -> _Drawing:
    names = [row.name for row in rows]
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    sides = zip(
        figure.subplots(1, 2, sharey=True), ("decode, tokens/s", "prefill, tokens/s"), (_BLUE, _GREEN), strict=True
    )
    measured = [row.decode_tokens_per_second for row in rows], [row.prefill_tokens_per_second for row in rows]
    for (axes, label, color), speeds in zip(sides, measured, strict=True):
        shown = [speed if speed is not None and math.isfinite(speed) else 0.0 for speed in speeds]
        axes.barh(
            range(len(rows)), shown, height=0.72, color=[color if row.passed is not None else _GREY for row in rows]
        )
        for place, speed in enumerate(speeds):
            if speed is not None:
                axes.annotate(
                    format_rounded(speed),
                    (shown[place], place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                )
        axes.set_xlim(0, 1.35 * max(shown, default=0.0) or 1.0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
        axes.yaxis.set_ticks(range(len(rows)), names)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    exports = {
        row.name: row.decode_tokens_per_second
        for row in rows
        if row.passed is not None and row.decode_tokens_per_second
    }
    torch = next((row.decode_tokens_per_second for row in rows if row.name == model), None)
    caption = "A request waits for the prefill once, and for a decode step with every token it is given."
    if exports and torch:
        name = max(exports, key=lambda n: exports[n])
        caption = (
            f"At batch 1 {name} decodes {exports[name] / torch:.1f} times as fast as the {model} model in "
            "torch, on the same machine."
        )
    return (
        _svg(figure, "speed"),
        "Bar chart: decoding and prefill speed of each model; torch models have no prefill figure.",
        caption,
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


def _layer_band(axes: Axes, logged: Sequence[dict[str, Any]], values: Sequence[Sequence[float]]) -> None:
    """The mean over layers [step][layer] as a line in the range of all layers, against tokens."""
    tokens = [step["num_tokens"] for step in logged]
    axes.fill_between(
        tokens,
        [min(layers) for layers in values],
        [max(layers) for layers in values],
        color=_BLUE,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(tokens, [fmean(layers) for layers in values], color=_BLUE, marker="." if len(values) <= 2 else "")
    _token_axis(axes)
    _mark_stages(axes, _stage_starts(logged), _GREY)


def _token_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _stage_starts(steps: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens at which one model's second and later stages begin."""
    return [before["num_tokens"] for before, after in pairwise(steps) if before["stage"] != after["stage"]]


def _mark_stages(axes: Axes, starts: Sequence[int], color: str) -> None:
    for tokens in starts:
        axes.axvline(tokens, color=color, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)


def _fair_shares(loads: Sequence[Sequence[float]]) -> list[list[float]]:
    """Load of each expert of each layer over what it would be if all were equal."""
    return [[share * len(load) for share in load] for load in loads]


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
        axis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 15 else (1, 2, 5) if ratio < 500 else (1,), numticks=30)
        )
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, at the first of some places where it covers nothing else.

    Or else where it covers least.
    """
    FigureCanvasAgg(figure)  # which keeps what measures text, where a figure by itself makes that anew for each label
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [Bbox(axes.transData.transform([(x, y), (x, y)])).padded(4) for x, y, _ in points]
    places = [
        (8, 0),
        (-8, 0),
        (0, 10),
        (0, -10),
        (7, 9),
        (-7, 9),
        (7, -9),
        (-7, -9),
        (0, 20),
        (0, -20),
        (7, 19),
        (-7, 19),
        (7, -19),
        (-7, -19),
    ]
    for x, y, name in points:
        found = []
        for number, (right, up) in enumerate(places):
            horizontal = "left" if right > 0 else "right" if right < 0 else "center"
            label = axes.annotate(
                name,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha=horizontal,
                va="center",
                fontsize=8.5,
                in_layout=False,
                parse_math=False,
            )
            bounds = label.get_window_extent()
            covered = sum(bounds.overlaps(other) for other in taken) + 2 * (
                not frame.containsx(bounds.x0) or not frame.containsx(bounds.x1)
            )
            found.append((covered, number, label, bounds))
            if not covered:
                break
        chosen = min(found, key=lambda item: item[:2])
        for candidate in found:
            if candidate is not chosen:
                candidate[2].remove()
        taken.append(chosen[3])


def _svg(figure: Figure, prefix: str) -> Markup:
    """The drawing as an `svg` element to stand in a page.

    No prolog, metadata or style of its own, and ids that no other picture has.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]  # `savefig` would draw it twice
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(
        r'(<svg\b[^>]*?)\swidth="[^"]*"',
        r"\1",
        re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return Markup(text.replace("<svg", '<svg aria-hidden="true"', 1))  # noqa: S704, matplotlib escapes the text in a drawing
