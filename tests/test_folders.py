"""No circle between what lies in a folder: neither between its modules nor between its folders."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("convert", "export")
Module = tuple[str, ...]


def modules(floor: str) -> dict[Module, ast.Module]:
    """Every module of a floor, as the path of its name, parsed."""
    found = {}
    for path in (ROOT / floor).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" else parts
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known: set[Module]) -> set[Module]:
    """The modules among `known` that a module imports, wherever in it, but for its types alone."""
    found = set()
    types_alone = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in types_alone):
        match node:
            case ast.Import(names=names):
                candidates = [name.name for name in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                candidates = [f"{module}.{name.name}" for name in names]
            case _:
                continue
        for candidate in candidates:
            parts = tuple(candidate.split("."))
            if parts[0] == "dense2moe":
                found |= {parts[1:end] for end in (len(parts), len(parts) - 1) if parts[1:end] in known}
    return found


def siblings(one: Module, other: Module) -> tuple[Module, str, str] | None:
    """The folder that two modules share, and what each is or lies in there; None where one is the folder itself."""
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if shared == min(len(one), len(other)):
        return None
    return one[:shared], one[shared], other[shared]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_circle_lies_in_a_folder(floor: str) -> None:
    trees = modules(floor)
    graphs: dict[Module, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, tree in trees.items():
        for read in imports(tree, set(trees)):
            if (found := siblings(name, read)) is not None:
                folder, own, other = found
                graphs[folder][own].add(other)
    circles = {}
    for folder, graph in graphs.items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circles["/".join(folder)] = error.args[1]
    assert circles == {}


def test_a_circle_is_found() -> None:
    known = {("export", "a", "x"), ("export", "b", "y")}
    tree = ast.parse(
        "from dense2moe.export.b.y import f\nfrom dense2moe.export.b import y\nimport dense2moe.export.a.x"
    )
    assert imports(tree, known) == known
    assert siblings(("export", "a", "x"), ("export", "b", "y")) == (("export",), "a", "b")
    assert siblings(("export", "a"), ("export", "a", "x")) is None
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
