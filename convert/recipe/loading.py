"""A recipe read from its file, its paths, its keys' lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, get_origin

from pydantic import ValidationError

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.document import YamlDocument, find_line, name_line
from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.recipe.refusals import explain, list_records
from dense2moe.convert.recipe.wording import Key, write_key
from dense2moe.upcycle.errors import MendableError

_MAX_BYTES: Final = 100_000
_KEY_FIRST: Final = re.compile(rf"({'|'.join(Recipe.model_fields)})((?:\.[\w-]+|\[\d+\])*)(?=:? )")
"""A key of the recipe, as a text of a lower floor begins with it."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with its name, file, text and lines of keys."""

    recipe: Recipe
    name: str
    path: Path
    text: str
    lines: Mapping[Key, int] = field(default_factory=dict)

    def name_place(self, *key: str | int) -> str:
        """Where a key is: `mine.yaml:3: data.block_size`."""
        return f"{name_line(self.path, self.lines, key)}: {write_key(key)}"

    @contextmanager
    def telling_lines(self) -> Iterator[None]:
        """Within the `with`, refusals that begin with a key tell their line.

        The floors below name keys alone, since they know of no file. A key that the file lacks has no line.

        Raises:
            MendableError: of the kind that it was.
        """
        try:
            yield
        except MendableError as error:
            key = _find_key(str(error))
            if not find_line(self.lines, key):
                raise
            raise type(error)(f"{name_line(self.path, self.lines, key)}: {error}") from error


def _find_key(text: str) -> Key:
    """The key of a recipe that a text begins with.

    Empty if it begins with anything else, as a path.
    """
    found = _KEY_FIRST.match(text)
    parts = re.findall(r"[\w-]+", found[0]) if found else []
    if len(parts) > 1:
        annotation = Recipe.model_fields[parts[0]].annotation
        if get_origin(annotation) is dict:  # whose keys are the recipe's own names
            return (parts[0], parts[1])
        records = list_records(annotation)
        if not parts[1].isdecimal() and not any(parts[1] in record.model_fields for record in records):
            return ()
    return tuple(int(part) if part.isdecimal() else part for part in parts)


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
    return LoadedRecipe(recipe, recipe.name or path.stem, path, text, document.lines)


def resolve_path(path: str, recipe_path: Path, place: str) -> Path:
    """The file or directory that a recipe's `path`, at `place`, means.

    Beside the recipe, or else below the current directory; `~` is the home.

    Raises:
        RecipeError: there is none.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{place}: '{path}' names no home directory; give the path in full") from error
    tried = list(dict.fromkeys(base / given for base in (recipe_path.absolute().parent, Path.cwd())))
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise RecipeError(f"{place}: '{path}' is not there; looked for {' and '.join(map(str, tried))}; correct the path")


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
