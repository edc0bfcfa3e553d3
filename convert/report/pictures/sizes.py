"""Pictures of size, quality and speed, and of a search of bits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dense2moe.convert.report.figures import describe_change, figure_title
from dense2moe.convert.report.numerals import format_count, format_rounded, format_size, trim_zeros
from dense2moe.convert.report.pictures.drawing import (
    BLUE,
    GREEN,
    GREY,
    INCHES,
    ORANGE,
    Drawing,
    choose_scale,
    open_axes,
    place_labels,
    set_ticks,
    write_svg,
)
from dense2moe.convert.report.summary import Row
from dense2moe.export.quantization.facts import BitSearch, SearchPoint
from dense2moe.upcycle.tasks.figure import Figure


def draw_sizes(rows: Sequence[Row]) -> Drawing:
    """A point for each model: figure against size of the files."""
    placed = [(row, row.figure) for row in rows if row.figure is not None and math.isfinite(row.figure.value)]
    kind = next(row.figure for row in rows if row.figure is not None)
    canvas, axes = open_axes("size of the files", f"{figure_title(kind)} on held-out text ({kind.better} is better)")
    for row, figure in placed:
        onnx = row.passed is not None
        axes.plot(
            row.size_bytes, figure.value, "o" if onnx else "s", color=BLUE if onnx else GREY, markersize=6, zorder=3
        )
    _scale_axes(axes, [row.size_bytes for row, _ in placed], [figure.value for _, figure in placed])
    axes.margins(0.16)
    place_labels(canvas, axes, [(row.size_bytes, figure.value, row.name) for row, figure in placed])
    exports = {row.name: (row.size_bytes, figure) for row, figure in placed if row.passed is not None}
    caption = f"{_better_corner(kind)} is better."
    if "ONNX float32" in exports and len(exports) > 1:
        whole_size, whole = exports["ONNX float32"]
        name, (size, figure) = min(exports.items(), key=lambda item: item[1][0])
        caption = (
            f"{_better_corner(kind)} is better: {name} is {whole_size / size:.1f} times smaller than ONNX float32, "
            f"its {figure.name} {describe_change(figure, whole)} that one's."
        )
    return write_svg(canvas, "size"), f"Scatter chart: {kind.name} against file size, a point for each model.", caption


def _better_corner(kind: Figure) -> str:
    return "Down and to the left" if kind.better == "lower" else "Up and to the left"


def _scale_axes(axes: Axes, sizes: Sequence[float], values: Sequence[float]) -> None:
    axes.set_xscale(choose_scale(sizes))
    axes.set_yscale(choose_scale(values))
    set_ticks(axes.xaxis, sizes, lambda value: trim_zeros(format_size(value)))
    set_ticks(axes.yaxis, values, lambda value: f"{value:.4g}")


def draw_search(variant: str, search: BitSearch) -> Drawing:
    """Every mixture of bits that a search tried, and the one chosen.

    Those that no other beats in both size and figure are joined by a line.
    """
    reference = search.reference_figures[0]
    tried = [(point, point.figures[0]) for point in search.points if math.isfinite(point.figures[0].value)]
    front: list[tuple[SearchPoint, Figure]] = []
    for point, figure in sorted(tried, key=lambda found: (found[0].package_bytes, -found[1].gain(0.0))):
        if not front or figure.gain(front[-1][1].value) > 0:
            front.append((point, figure))
    canvas, axes = open_axes("size of the files", figure_title(reference))
    sizes, values = [point.package_bytes for point, _ in tried], [figure.value for _, figure in tried]
    axes.plot(sizes, values, "o", color=GREY, markersize=4, alpha=0.6)
    beaten_by_none = [point.package_bytes for point, _ in front], [figure.value for _, figure in front]
    axes.plot(*beaten_by_none, color=BLUE, marker="o", markersize=4)
    axes.axhline(reference.value, color=GREY, linewidth=0.9, linestyle=(0, (4, 1.5)))
    _scale_axes(axes, sizes, values)
    axes.margins(0.12)
    chosen = next(((point, figure) for point, figure in tried if point.chosen), None)
    if chosen is None:
        caption = (
            f"Of {len(tried)} mixtures of bits none on the line is beaten in both; none met the limit: {search.limit}."
        )
    else:
        point, figure = chosen
        ring = {"markerfacecolor": "none", "markersize": 11, "markeredgewidth": 1.6}
        axes.plot(point.package_bytes, figure.value, "o", color=ORANGE, **ring)  # type: ignore[arg-type]
        place_labels(canvas, axes, [(point.package_bytes, figure.value, point.label)])
        caption = (
            f"Of {len(tried)} mixtures of bits those on the line are beaten by none in both size and {figure.name}; "
            f"the ring is the one chosen, {format_size(point.package_bytes)}, its {figure.name} "
            f"{describe_change(figure, reference)} the reference's (dashed); the limit: {search.limit}."
        )
    return (
        write_svg(canvas, f"search-{re.sub('[^a-z0-9]', '-', variant)}"),
        f"Scatter chart: {reference.name} against file size of every mixture of bits that was tried, with the best of "
        "each size joined by a line.",
        caption,
    )


def draw_speeds(rows: Sequence[Row], model: str) -> Drawing:
    """Bars of each model's decoding and prefill, in tokens a second.

    Of models that do not decode, prefill alone.
    """
    sides = [
        ("decode, tokens/s", BLUE, [row.decode_tokens_per_second for row in rows]),
        ("prefill, tokens/s", GREEN, [row.prefill_tokens_per_second for row in rows]),
    ]
    decodes = any(speed is not None for speed in sides[0][2])
    sides = sides if decodes else sides[1:]
    figure = Canvas(figsize=INCHES, dpi=72, layout="constrained")
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (label, color, speeds) in zip(panels, sides, strict=True):
        _draw_bars(axes, rows, speeds, color)
        axes.set_xlabel(label)
    panels[-1].set_ylim(len(rows) - 0.4, -0.6)
    if not decodes:
        return write_svg(figure, "speed"), "Bar chart: how fast each model reads.", "A text is read in one pass."
    return (
        write_svg(figure, "speed"),
        "Bar chart: decoding and prefill speed of each model; torch models have no prefill figure.",
        _compare_decoding(rows, model),
    )


def _draw_bars(axes: Axes, rows: Sequence[Row], speeds: Sequence[float | None], color: str) -> None:
    """A bar for each model, grey for torch."""
    shown = [speed if speed is not None and math.isfinite(speed) else 0.0 for speed in speeds]
    axes.barh(range(len(rows)), shown, height=0.72, color=[color if row.passed is not None else GREY for row in rows])
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
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: trim_zeros(format_count(value))))
    axes.yaxis.set_ticks(range(len(rows)), [row.name for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _compare_decoding(rows: Sequence[Row], model: str) -> str:
    """The fastest export beside the torch model."""
    exports = {
        row.name: row.decode_tokens_per_second
        for row in rows
        if row.passed is not None and row.decode_tokens_per_second
    }
    torch = next((row.decode_tokens_per_second for row in rows if row.name == model), None)
    if not exports or not torch:
        return "A request waits for the prefill once, and for a decode step with every token it is given."
    name = max(exports, key=lambda n: exports[n])
    return (
        f"At batch 1 {name} decodes {exports[name] / torch:.1f} times as fast as the {model} model in "
        "torch, on the same machine."
    )
