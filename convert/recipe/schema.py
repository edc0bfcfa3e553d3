"""The JSON schema of a recipe, for editors."""

from __future__ import annotations

from typing import Any

from dense2moe.convert.recipe.records import Recipe


def make_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors.

    A recipe's first line may be `# yaml-language-server: $schema=FILE`.
    """
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Recipe.model_json_schema() | {"title": "Recipe of dense2moe"}
