"""Sentences about values in files: what is, and what must be."""

from __future__ import annotations

import json
from typing import Any

_SHOWN = 60  # characters of a value in a sentence


def show(value: Any) -> str:
    """A value from a file, short and on one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def show_ids(ids: Any) -> str:
    """Token ids in words; anything else as it is."""
    if not isinstance(ids, frozenset):
        return show(ids)
    return "none" if not ids else show(sorted(ids)) if len(ids) > 1 else show(min(ids))


def tell_wrong(where: str, found: Any, expected: str) -> str:
    """The sentence that a value differs from the required one."""
    return f"{where} is {'not set' if found is None else show(found)}; must be {expected}"


def as_ids(value: Any) -> Any:
    """Token ids as a set; anything else unchanged.

    One id, a list and None become a set.
    """
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    return frozenset(ids) if all(type(number) is int for number in ids) else value


def known_ids(value: Any) -> frozenset[int]:
    """Token ids as a set; empty for anything else."""
    ids = as_ids(value)
    return ids if isinstance(ids, frozenset) else frozenset()
