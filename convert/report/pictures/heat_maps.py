"""Heat maps: which experts the tokens of each layer go to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dense2moe.convert.report.numerals import format_share
from dense2moe.convert.report.pictures.drawing import Drawing, fair_shares, open_axes, write_svg
from dense2moe.upcycle.training.facts import DomainRouting, LabelRouting
from dense2moe.upcycle.training.history import Step

_MOST_LABELS, _LABEL_LETTERS = 16, 24  # that a picture has room for


def draw_loads(step: Step) -> Drawing:
    """The load of each expert in each layer, at one step."""
    shares = fair_shares([layer.load for layer in step.layers])
    names = [layer.number for layer in step.layers]
    figure, _ = _heat_map(shares, names, max(map(len, shares)))
    cells = [(share, y, x) for y, layer in enumerate(shares) for x, share in enumerate(layer)]
    (high, y, x), low = max(cells, key=itemgetter(0)), min(cells, key=itemgetter(0))
    return (
        write_svg(figure, "load"),
        "Heat map: load of each expert in each layer, relative to its fair share.",
        f"At step {step.step} the busiest expert ({x} of layer {names[y]}) got {high:.2f} times its fair share of "
        "the tokens "
        f"and the idlest ({low[2]} of layer {names[low[1]]}) {low[0]:.2f} times.",
    )


def draw_specialization(domains: DomainRouting, names: Sequence[int]) -> Drawing:
    """Load of each expert in each layer, domains side by side."""
    shares = {domain: fair_shares(loads) for domain, loads in domains.loads.items()}
    num_experts = len(next(iter(shares.values()))[0])
    figure, axes = _heat_map([list(chain(*layer)) for layer in zip(*shares.values(), strict=True)], names, num_experts)
    room = 46 // len(shares)  # letters that fit above a domain's columns
    for place, domain in enumerate(shares):
        text = _cut(domain, room)
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
    between, within = fmean(domains.between), fmean(domains.within)
    taken = {
        (y, x): [(layers[y][x], domain) for domain, layers in shares.items()]
        for y in range(len(names))
        for x in range(num_experts)
    }
    (layer, expert), furthest = max(taken.items(), key=lambda item: max(item[1])[0] - min(item[1])[0])
    (most, here), (least, there) = max(furthest), min(furthest)
    most_information = math.log(min(len(domains.loads), num_experts))
    finding = "know" if between > 2 * within else "hardly know" if between > within else "do not know"
    return (
        write_svg(figure, "specialization"),
        "Heat map: load of each expert in each layer, relative to its fair share, side by side for each domain of "
        "the held-out text.",
        f"From one domain to another {format_share(between)} of a layer's load moves to other experts, from one half "
        "of a domain to the other "
        f"{format_share(within)}, so the experts {finding} the domains (mutual information of expert and domain: "
        f"{fmean(domains.information):.2f} of at most {most_information:.2f} nats); the greatest difference is expert "
        f"{expert} "
        f"of layer {names[layer]}, "
        f"with {most:.2f} times its fair share of {here} and {least:.2f} times of {there}.",
    )


def draw_labels(labels: LabelRouting, names: Sequence[int]) -> Drawing:
    """Load of each expert by label, in the best-knowing layer."""
    place = max(range(len(labels.information)), key=labels.information.__getitem__)
    shares = dict(zip(labels.loads, fair_shares([layers[place] for layers in labels.loads.values()]), strict=True))
    num_experts = len(next(iter(shares.values())))
    middle = [fmean(column) for column in zip(*shares.values(), strict=True)]
    far = {label: sum(abs(a - b) for a, b in zip(own, middle, strict=True)) for label, own in shares.items()}
    drawn = set(sorted(far, key=far.__getitem__, reverse=True)[:_MOST_LABELS])
    rows = {label: own for label, own in shares.items() if label in drawn}
    figure, _ = _heat_map(list(rows.values()), [_cut(label, _LABEL_LETTERS) for label in rows], num_experts, "label")
    columns = [[(own[expert], label) for label, own in shares.items()] for expert in range(num_experts)]
    expert = max(range(num_experts), key=lambda number: max(columns[number])[0] - min(columns[number])[0])
    (most, here), (least, there) = max(columns[expert]), min(columns[expert])
    left_out = f" Drawn are the {len(rows)} labels of {len(shares)} that differ most from the rest."
    return (
        write_svg(figure, "labels"),
        f"Heat map: load of each expert of layer {names[place]} in the tokens of each label, relative to its fair "
        "share.",
        f"Of all layers the experts of layer {names[place]} know most of the labels (mutual information of expert and "
        f"label: {labels.information[place]:.2f} of at most {math.log(min(len(shares), num_experts)):.2f} nats): "
        f"expert {expert} gets {most:.2f} times its fair share of {here} and {least:.2f} times of {there}."
        f"{left_out if len(rows) < len(shares) else ''}",
    )


def _heat_map(
    shares: Sequence[Sequence[float]], names: Sequence[object], num_experts: int, what: str = "layer"
) -> tuple[Figure, Axes]:
    """Shares of each row by expert (column); 1 is fair.

    Columns count through the experts once, or once a domain with a gap between.
    """
    num_layers, num_columns = len(shares), max(map(len, shares))
    edges = [_column_edge(n, num_experts, num_columns // num_experts) for n in range(num_columns)]
    sides = sorted({*edges, *(edge + 1 for edge in edges)})
    cells = [[math.nan if side not in edges else layer[edges.index(side)] for side in sides[:-1]] for layer in shares]
    figure, axes = open_axes("expert", what)
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
    axes.yaxis.set_ticks(
        [n + 0.5 for n in range(0, num_layers, down)], [str(name) for name in names[::down]], parse_math=False
    )
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


def _cut(text: str, room: int) -> str:
    """A name in as many letters as there is room for."""
    return text if len(text) <= room else f"{text[: max(1, room - 1)]}…"


def _column_edge(column: int, num_experts: int, num_groups: int) -> float:
    """Where a column of a heat map begins, with gaps between groups."""
    return column + column // num_experts * num_experts * num_groups / 64


def _even(largest: float) -> list[float]:
    stride = max(1, math.ceil((largest - 1) / 4))
    return [float(tick) for tick in range(1 + stride, math.floor(largest) + 1, stride)]
