"""Numbers as the report writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NONE = "—"


def agree(a: float, b: float, digits: int) -> bool:
    """Whether two numbers agree to `digits` digits of the first.

    They may differ by half a unit in the last digit.
    """
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    return a == b or (a != 0 and abs(a - b) <= 0.5 * 10.0 ** (math.floor(math.log10(abs(a))) + 1 - digits))


def format_special(value: float) -> str | None:
    """NaN and infinities as text; None for a finite number."""
    return None if math.isfinite(value) else "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def format_digits(value: float, digits: int = 4) -> str:
    """A number to `digits` digits: 17.46; exponents from 1e7 on."""
    size = abs(value)
    if size >= 1e7 or format_special(value):
        return format_special(value) or f"{value:.3e}"
    return f"{value:,.0f}" if size >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def format_rounded(value: float | None) -> str:
    """A speed: whole from 100 on, else with one decimal."""
    if value is None:
        return NONE
    return format_special(value) or (f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}")


def format_seconds(value: float) -> str:
    """A duration in its largest unit: 51.5 s, 2.35 min, 1.40 h."""
    if value < 60 or format_special(value):
        return f"{format_rounded(value)} s"
    return format_scaled(value, ((86_400, "d"), (3600, "h"), (60, "min")))


def format_operations(value: float) -> str:
    """A number of floating-point operations in its largest unit: 12.1 TFLOP."""
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    return f"{format_special(value)} FLOP" if format_special(value) else format_scaled(value, units)


def format_error(value: float) -> str:
    """A small number: 5.7e-7."""
    return format_special(value) or ("0" if value == 0 else re.sub(r"e([+-])0", r"e\1", f"{value:.1e}"))


def format_agreement(value: float | None) -> str:
    """A share as a percentage; 100 % only if nothing differs."""
    if value is None:
        return NONE
    if special := format_special(value):
        return special
    text = f"{100 * value:.2f}"
    return "100 %" if value == 1 else ">99.99 %" if text == "100.00" else f"{text} %"


def format_share(value: float) -> str:
    """A difference as a percentage without its sign."""
    percent = 100 * abs(value)
    return format_special(percent) or (
        "less than 0.01 %" if percent < 0.01 else f"{percent:.2f} %" if percent < 10 else f"{percent:,.0f} %"
    )


def format_score(value: float) -> str:
    """A task's score, to three decimals: 0.712."""
    return format_special(value) or f"{value:.3f}"


def format_difference(value: float, error: float) -> str:
    """A difference of scores with its standard error: −0.010 ± 0.008."""
    return f"{'−' if value < 0 else '+' if value > 0 else ''}{format_score(abs(value))} ± {format_score(error)}"


def format_scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest unit that fits: 4.13 M."""
    scale, unit = next(((s, u) for s, u in units if value >= 0.9995 * s), units[-1])
    number = value / scale
    return f"{number:.0f} {unit}".strip() if number >= 99.95 or scale == 1 else f"{number:#.3g} {unit}"


def format_size(num_bytes: float) -> str:
    """Bytes in decimal units: 45.1 MB."""
    return format_scaled(num_bytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def format_count(number: float) -> str:
    """A count in thousands, millions and so on: 4.20 M."""
    return format_scaled(number, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")))


def trim_zeros(text: str) -> str:
    """A scaled number without trailing zeros: 50.0 k becomes 50 k."""
    return re.sub(r"\.0+(?= )|(?<=\.\d)0(?= )", "", text)
