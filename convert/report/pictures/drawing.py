"""Drawing: colours, axes, labels and SVG, for all pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from dense2moe.convert.report.numerals import format_count, trim_zeros
from dense2moe.upcycle.training.history import Step


@dataclass(frozen=True)
class Picture:
    """A drawing: title, SVG, alternative text, and a caption."""

    title: str
    svg: Markup
    alt: str
    caption: str


Drawing = tuple[Markup, str, str]  # what a picture has beside its title


SETTINGS: dict[Any, Any] = {
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


BLUE, GREEN, ORANGE, GREY = "#0072b2", "#009e73", "#d55e00", "#767676"


# Okabe and Ito's, told apart by the colour-blind too
PALETTE = (
    BLUE,
    GREEN,
    ORANGE,
    "#cc79a7",
    "#7a5195",
    "#b8860b",
)


MARKERS = ("o", "s", "^", "D", "v", "P")


INCHES = (4.8, 3.1)  # 346 points: shown at about its own size on a phone, so that the text stays readable there


def open_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, labelled."""
    figure = Figure(figsize=INCHES, dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def draw_layer_lines(axes: Axes, lines: Mapping[str, Sequence[float]]) -> None:
    """A line for each variant over the layers.

    Markers differ, so that equal lines and print in grey can be read.
    """
    for number, (name, values) in enumerate(lines.items()):
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(range(len(values)), values, label=name, markersize=5 if len(values) <= 16 else 2.5, **style)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend(labelspacing=0.35, handlelength=2.2)


def draw_layer_band(axes: Axes, logged: Sequence[Step], values: Sequence[Sequence[float]]) -> None:
    """Mean and range over layers [step][layer], against tokens."""
    tokens = [step.num_tokens for step in logged]
    axes.fill_between(
        tokens,
        [min(layers) for layers in values],
        [max(layers) for layers in values],
        color=BLUE,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(tokens, [fmean(layers) for layers in values], color=BLUE, marker="." if len(values) <= 2 else "")
    mark_tokens(axes)
    mark_phases(axes, find_phase_starts(logged), GREY)


def mark_tokens(axes: Axes) -> None:
    """Write tokens in thousands and millions along the lower axis."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def find_phase_starts(steps: Sequence[Step]) -> list[int]:
    """Tokens at which one model's second and later phases begin."""
    return [before.num_tokens for before, after in pairwise(steps) if before.phase != after.phase]


def mark_phases(axes: Axes, starts: Sequence[int], color: str) -> None:
    """A thin line where a phase begins."""
    for tokens in starts:
        axes.axvline(tokens, color=color, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)


def choose_scale(values: Sequence[float]) -> Literal["log", "linear"]:
    """Logarithmic where positive values span more than a factor of three."""
    return "log" if values and max(values) > 3 * min(values) > 0 else "linear"


def set_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Ticks as dense as the values' span allows, written by `text`."""
    if choose_scale(values) == "log":
        ratio = max(values) / min(values)
        axis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 15 else (1, 2, 5) if ratio < 500 else (1,), numticks=30)
        )
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, covering as little as possible."""
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


def write_svg(figure: Figure, prefix: str) -> Markup:
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


def fair_shares(loads: Sequence[Sequence[float]]) -> list[list[float]]:
    """Load of each expert of each layer over the fair share."""
    return [[share * len(load) for share in load] for load in loads]
