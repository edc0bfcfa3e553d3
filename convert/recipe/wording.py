"""Keys, values and choices as people write them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable

Key = tuple[str | int, ...]
Mistake = tuple[Key, str]


def join_choices(words: Iterable[str], conjunction: str = "or") -> str:
    """Words in quotes, as in 'a', 'b' or 'c'."""
    *rest, last = [f"'{word}'" for word in words]
    return f"{', '.join(rest)} {conjunction} {last}" if rest else last


def write_key(key: Key) -> str:
    """A key as people write it: `data.source.train[0]`."""
    words = (
        part if isinstance(part, int) or re.fullmatch(r"[\w-]{1,60}", part) else reprlib.repr(part) for part in key
    )
    parts = (f"[{word}]" if isinstance(word, int) else f".{word}" for word in words)
    return "".join(parts).removeprefix(".") or "recipe"


def show_value(value: object) -> str:
    """A value as an error quotes it, shortened."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "a list" if value else "an empty list"
        case dict():
            return "a mapping"
        case _:
            return reprlib.repr(value)
