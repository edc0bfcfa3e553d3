"""Recipes in tests: written into the current directory, and read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import LoadedRecipe, load_recipe

GOOD = "source: dense\ndata: {source: {kind: python-docs}}\n"
"""A recipe; what is added after it starts at line 3."""


def load(text: str | bytes) -> LoadedRecipe:
    """The recipe of a text."""
    path = Path("r.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


def wrong(key: str, value: object, must: str, line: int = 3) -> str:
    """The line of a key whose value cannot be."""
    return f"r.yaml:{line}: {key}: is {value}; must be {must}"


def unknown(key: str, meant: str, line: int = 3) -> str:
    """The line of a key that there is not, where another one was meant."""
    return f"r.yaml:{line}: {key}: unknown key; did you mean '{meant}'?"


def mistakes(text: str | bytes) -> list[str]:
    """The lines that refuse a text."""
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value).split("\n")
