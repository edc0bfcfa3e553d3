"""Figures in words: titles, numbers, and how two figures compare."""

from __future__ import annotations

import math

from dense2moe.convert.report.numerals import NONE, agree, format_digits, format_share
from dense2moe.upcycle.tasks.figure import Figure

_MOST_DIGITS = 7
_ROUNDING = 1e-6
"""Of a figure: two that differ by a smaller share differ by the rounding of float32."""


def figure_title(figure: Figure) -> str:
    """A figure's name and unit as a heading: "Perplexity", "Loss, nats"."""
    name = figure.name[:1].upper() + figure.name[1:]
    return f"{name}, {figure.unit}" if figure.unit else name


def format_figure(figure: Figure | None, digits: int = 4) -> str:
    """The number of a figure, with its unit."""
    if figure is None:
        return NONE
    number = format_digits(figure.value, digits)
    return f"{number} {figure.unit}" if figure.unit else number


def describe_change(new: Figure, old: Figure) -> str:
    """How `new` compares to `old`: "1.20 % worse than"."""
    if not (math.isfinite(new.value) and math.isfinite(old.value)):
        return "not comparable with"
    gain = new.gain(old.value)
    if gain == 0:
        return "equal to"
    if _is_rounding(gain, old.value):
        return "equal but for rounding to"
    return f"{_size(gain, old)} {'better' if gain > 0 else 'worse'} than"


def format_improvement(new: Figure, old: Figure) -> str:
    """By how much a better figure is better: "lower by 6.38 %"."""
    return f"{new.better} by {_size(new.gain(old.value), old)}"


def describe_step(old: Figure, new: Figure) -> tuple[str, str, bool | None]:
    """The step between two figures: numbers, words, and whether better.

    Both numbers have as many digits as it takes to tell them apart.
    """
    if not (math.isfinite(new.value) and math.isfinite(old.value)):
        return f"{format_figure(old)} → {format_figure(new)}", "not comparable", False
    gain = new.gain(old.value)
    if _is_rounding(gain, old.value):
        return f"{format_figure(old)} → {format_figure(new)}", "the same but for rounding", None
    digits = next((n for n in range(3, _MOST_DIGITS) if not same_text(old, new, n)), _MOST_DIGITS)
    word = "better" if gain > 0 else "worse"
    return (
        f"{format_figure(old, digits)} → {format_figure(new, digits)}",
        f"{word} by {_size(gain, old)}",
        gain > 0,
    )


def same_text(first: Figure, second: Figure, digits: int) -> bool:
    """Whether two figures read the same, to `digits` digits."""
    return format_digits(first.value, digits) == format_digits(second.value, digits)


def figures_agree(first: Figure, second: Figure, digits: int) -> bool:
    """Whether two figures agree to `digits` digits."""
    return agree(first.value, second.value, digits)


def _is_rounding(gain: float, of: float) -> bool:
    return abs(gain) <= _ROUNDING * abs(of)


def _size(gain: float, of: Figure) -> str:
    """A difference in points of a score, or as a share.

    Itself where `of` is not positive.
    """
    if of.is_score:
        return f"{format_digits(100 * abs(gain), 3)} points"
    return format_share(gain / of.value) if of.value > 0 else format_digits(abs(gain), 3)
