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


def mistakes(text: str | bytes) -> list[str]:
    """The lines that refuse a text."""
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value).split("\n")
