"""The language of the packages: short first lines, no riddles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("dense2moe", "convert", "upcycle", "export")
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
MOST_WORDS = 12


def docstrings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every docstring of a module, with the name of what it describes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield getattr(node, "name", "the module"), docstring


@pytest.mark.parametrize("floor", FLOORS)
def test_a_first_line_has_at_most_twelve_words(floor: str) -> None:
    """Private functions too: what does not fit stands below the first line."""
    long = {
        f"{path.relative_to(ROOT)}: {name}: {first}"
        for path in MODULES
        if path.is_relative_to(ROOT / floor)
        for name, docstring in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        for first, *_ in [docstring.split("\n")]
        if len(first.split()) > MOST_WORDS
    }
    assert long == set()


def test_a_first_line_is_a_whole_sentence() -> None:
    """A line that goes on below it would be cut by whoever shows the first line alone."""
    open_ended = {
        f"{path.relative_to(ROOT)}: {name}: {paragraph}"
        for path in MODULES
        for name, docstring in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        for paragraph in [docstring.split("\n\n")[0]]
        if "\n" in paragraph
    }
    assert open_ended == set()


def public_names(tree: ast.Module) -> Iterator[str]:
    """Classes and aliases of types that a module defines; a `TypeVar` is none of them."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            is_variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
            yield from (name for name in names if name[0].isupper() and not name.isupper() and not is_variable)


def test_no_public_class_name_is_defined_twice() -> None:
    """One word, one meaning: a record's name says what it is, wherever it is read."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_"):
                places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


RIDDLES = re.compile(
    r"\b(that of|those of|that is none|one that is no|so many|taken up again|goe?s? on from|for want of"
    r"|differs? by from|for the length of a|look at the validation)\b",
    re.IGNORECASE,
)
"""Words that stand for a noun which the reader has to find again, or for the field's own word."""


def sentences(tree: ast.Module) -> Iterator[str]:
    """Texts of five words and more that are no docstrings: messages, help texts, descriptions of keys, reports."""
    own = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in own:
            text = node.value
        else:
            continue
        if len(text.split()) >= 5:
            yield text


@pytest.mark.parametrize("floor", FLOORS)
def test_nouns_are_repeated_where_a_person_reads(floor: str) -> None:
    """In first lines, and in whatever a command, a report, an error or the description of a key says."""
    riddles = set[str]()
    for path in MODULES:
        if path.is_relative_to(ROOT / floor):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            lines = [docstring.split("\n")[0] for _, docstring in docstrings(tree)]
            riddles |= {
                f"{path.relative_to(ROOT)}: {text}" for text in [*lines, *sentences(tree)] if RIDDLES.search(text)
            }
    assert riddles == set()


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name
)
def test_nouns_are_repeated_in_the_docs(page: Path) -> None:
    assert RIDDLES.findall(page.read_text(encoding="utf-8")) == []
