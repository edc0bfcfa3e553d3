"""Numbers that are not finite, in JSON.

A loss, a divergence or an error of a broken model is NaN or infinite, and saying so is the job of every record; it must
neither end a run nor become a token that JSON does not have.
"""

from __future__ import annotations

import math
from typing import Any


def name_special(value: float) -> str | None:
    """The name of NaN or an infinity, as Python's JSON writes it.

    "NaN", "Infinity", "-Infinity"; None of a finite number.
    """
    return None if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def name_specials(value: Any) -> Any:
    """A value with NaN and infinities replaced by their names.

    Lists, dicts and scalars become strict JSON.

    Tuples become lists.
    """
    match value:
        case dict():
            return {key: name_specials(item) for key, item in value.items()}
        case list() | tuple():
            return [name_specials(item) for item in value]
        case float():
            return name_special(value) or value
        case _:
            return value
