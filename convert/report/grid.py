"""A grid: a table whose cells are text; facts become cells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from dense2moe.convert.report.names import JSON_NAME
from dense2moe.convert.report.numerals import NONE, format_agreement, format_error, format_size, format_special

_SHOWN = 16  # items of a list


@dataclass(frozen=True)
class Grid:
    """A table of the page, its cells already text.

    Columns in which every cell is a number align right, but for the first, which names the row.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers alone."""
        number = re.compile(rf"[<>−-]?\d[\d.,e+-]*( \S+)?|NaN|−?∞|{NONE}")
        return tuple(n > 0 and all(number.fullmatch(row[n]) for row in self.rows) for n in range(len(self.headers)))


def list_facts(facts: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Facts as names and texts, nested ones with dotted names.

    Lists that are long or of records are counted, since the JSON has them.
    """
    match facts:
        case Mapping():
            for key, value in facts.items():
                yield from list_facts(value, f"{name}.{key}" if name else str(key))
        case list() | tuple():
            small = len(facts) <= _SHOWN and not any(isinstance(item, (Mapping, list, tuple)) for item in facts)
            small = small and not any(map(is_dataclass, facts))
            shown = ", ".join(_describe_fact(name, item) for item in facts) or NONE
            yield name, shown if small else f"{len(facts)} entries, in {JSON_NAME}"
        case _ if is_dataclass(facts):
            yield from list_facts(shallow(facts), name)
        case _:
            yield name, _describe_fact(name, facts)


def shallow(record: Any) -> dict[str, Any]:
    """The fields of a record by name; nested records stay records."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def tabulate(records: Sequence[Any], leave_out: Sequence[str] = ()) -> Grid:
    """Records of one kind as a table, without empty columns."""
    found = [shallow(record) for record in records]
    names = [
        name
        for name in (found[0] if found else ())
        if name not in leave_out and any(record[name] is not None for record in found)
    ]
    rows = tuple(tuple(_describe_fact(name, record[name]) for name in names) for record in found)
    return Grid(tuple(map(column_title, names)), rows)


def column_title(name: str) -> str:
    """The name of a field in words."""
    return _TITLES.get(name, name.replace("_", " "))


_TITLES = {
    "num_tokens": "tokens",
    "kl": "KL, nats",
    "top1_agreement": "top-1 agreement",
    "name": "check",
    "num_tie_flips": "tie flips",
    "first_position": "first token beyond",
}


def _describe_fact(name: str, value: Any) -> str:
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return format_size(value)
        case int():
            return f"{value:,}" if "num_" in name else str(value)
        case float() if "agreement" in name:
            return format_agreement(value)
        case float() if "error" in name or name in ("rel", "kl"):
            return format_error(value)
        case float():
            return format_special(value) or f"{value:.5g}"
        case _:
            return str(value)
