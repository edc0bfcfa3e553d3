"""Families by shape: what runs by default, and what `pytest -m every_family` runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def each_shape(cases: Iterable[Any], shapes: Collection[str], name: Callable[[Any], str] = str) -> list[Any]:
    """Parameters of a test of many families; by default it runs those of `shapes`, one for each shape.

    `name` gives the name of a case, which is its ID; a case may be a tuple of several arguments.
    """
    cases = list(cases)
    names = [name(case) for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    assert set(shapes) <= set(names), f"no cases: {sorted(set(shapes) - set(names))}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.every_family(default=each in shapes),
            id=each,
        )
        for case, each in zip(cases, names, strict=True)
    ]


def drop_other_families(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is no default of `each_shape`, unless `-m` names the marker or an argument names a test."""
    if "every_family" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        default = all(mark.kwargs.get("default") for mark in item.iter_markers("every_family"))
        (kept if default else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept
