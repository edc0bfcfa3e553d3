"""The README is true and short: its size, tree, commands and output."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ("dense2moe", "convert", "upcycle", "export")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_block(language: str, start: str, text: str = README) -> str:
    """The fenced block of `language` whose first line starts with `start`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return next(block for block in blocks if block.lstrip().startswith(start))


def tree_entries() -> dict[str, str]:
    """Path to comment, from the README's tree: two spaces a level, one name or several on a line."""
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in code_block("text", "dense2moe/").splitlines():
        names, _, comment = line.partition("# ")
        depth = (len(names) - len(names.lstrip())) // 2
        for name in names.split():
            parents[depth:] = [name]
            entries["".join(parents)] = comment.strip()
    return entries


def test_it_is_read_in_minutes():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 14_000


def test_every_path_in_the_tree_exists():
    for path in tree_entries():
        assert (ROOT / path).exists(), path


def test_every_package_is_in_the_tree():
    inits = {path for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")}
    assert {f"{path.parent.relative_to(ROOT)}/" for path in inits} <= set(tree_entries())


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    inits = {
        path.parent.relative_to(ROOT).as_posix() for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")
    }
    names = {f"dense2moe.{folder.replace('/', '.')}" for folder in inits if folder != "dense2moe"} | {"dense2moe"}
    assert set(project["tool"]["setuptools"]["packages"]) == names


def test_a_comment_in_the_tree_is_short_and_a_module_s_is_the_first_line_of_its_docstring():
    for path, comment in tree_entries().items():
        assert len(comment.split()) <= 12, path
        if path.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            assert docstring is not None, path
            assert comment == docstring.splitlines()[0].rstrip("."), path


def test_the_two_commands_are_single_lines():
    assert 'pip install -c constraints.txt ".[cpu]" && dense2moe run recipes/quickstart.yaml\n' in README
    assert 'pip install -c constraints.txt ".[cpu,test]" && pytest\n' in README


def test_its_output_is_part_of_the_whole_output():
    whole = iter((ROOT / "docs" / "results" / "quickstart.md").read_text(encoding="utf-8").splitlines())
    for line in code_block("text", "Top-1").splitlines():
        assert line in whole, line  # in the same order: `in` goes on where it stopped
