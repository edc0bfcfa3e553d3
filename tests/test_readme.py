"""The README is true: its tree, its help texts, its commands."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from programs import dense2moe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_block(language: str, start: str) -> str:
    """The fenced block of `language` whose first line starts with `start`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def tree_entries() -> dict[str, str]:
    """Path to comment, from the README's tree, whose indentation is two spaces a level."""
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in code_block("text", "convert/").splitlines():
        name, _, comment = line.partition("  #") if "  #" in line else (line, "", "")
        depth = (len(name) - len(name.lstrip())) // 2
        parents[depth:] = [name.strip()]
        entries["".join(parents)] = comment.strip()
    return entries


def test_every_path_in_the_tree_exists():
    for path in tree_entries():
        assert (ROOT / path).exists(), path


def test_every_module_is_in_the_tree():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = tracked.stdout.split() if tracked.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.glob("[a-z]*/**/*.py")]
    modules = {name for name in files if name.split("/")[0] in ("convert", "upcycle", "export") and not name.endswith("__init__.py")}
    assert modules <= set(tree_entries())


def test_a_module_s_comment_is_the_first_line_of_its_docstring():
    for path, comment in tree_entries().items():
        if path.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            assert docstring is not None, path
            assert comment == docstring.splitlines()[0].rstrip("."), path


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["generate", "--help"]])
def test_help_texts_are_those_of_the_command(arguments):
    shown = code_block("console", f"$ dense2moe {' '.join(arguments)}\n")
    result = dense2moe(*arguments, terminal_width=100)
    assert shown.split("\n", 1)[1].rstrip() == result.output.rstrip()


def test_the_two_commands_are_single_lines():
    assert 'pip install -c constraints.txt ".[cpu]" && dense2moe run recipes/quickstart.yaml\n' in README
    assert 'pip install -c constraints.txt ".[cpu,test]" && pytest\n' in README
