"""A recipe read from its file, and the paths in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.document import YamlDocument
from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.recipe.refusals import explain

_MAX_BYTES: Final = 100_000


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with its name, file and text."""

    recipe: Recipe
    name: str
    path: Path
    text: str


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: with one line `FILE:LINE: KEY: what is; what must be` for each mistake in the file.
    """
    text = _read_text(path)
    document = YamlDocument(path, text)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        document.mistakes += [mistake for details in error.errors() for mistake in explain(details)]
    if document.mistakes:
        raise document.refusal()
    return LoadedRecipe(recipe, recipe.name or path.stem, path, text)


def resolve_path(path: str, recipe_path: Path) -> Path:
    """The file or directory that a recipe's `path` means.

    Beside the recipe, or else below the current directory; `~` is the home.

    Raises:
        RecipeError: there is none.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{recipe_path}: '{path}' names no home directory; give the path in full") from error
    tried = list(dict.fromkeys(base / given for base in (recipe_path.absolute().parent, Path.cwd())))
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise RecipeError(
        f"{recipe_path}: '{path}' is not there; looked for {' and '.join(map(str, tried))}; correct the path"
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; give the path of a recipe") from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {_MAX_BYTES} bytes; must be a recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 (byte {raw[error.start]:#04x}); save it as UTF-8") from error
