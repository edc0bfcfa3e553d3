"""The docs are true: links, anchors, recipes, and what pages take from the code."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from dense2moe.convert.cli import main
from dense2moe.convert.recipe.loading import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()


def anchors(page: Path) -> set[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {MAKER.slug(heading) for heading in re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_a_target(page: Path):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {
            (page.parent / link.partition("#")[0]).resolve()
            for page in new
            for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        }
        new = {path for path in links if path.suffix == ".md" and path.is_file()} - reached
    assert set(PAGES) <= reached


@pytest.mark.parametrize("name", ["recipe.md", "commands.md"])
def test_what_a_page_takes_from_the_code_is_what_the_code_says(name: str):
    """Mend it by `python docs/make_pages.py`."""
    page = ROOT / "docs" / name
    assert page.read_text(encoding="utf-8") == MAKER.make_pages()[page]


def test_every_command_has_its_help_text():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert "$ dense2moe --help\n" in text
    for name in main.commands:
        assert f"\n## {name}\n" in text
        assert f"$ dense2moe {name} --help\n" in text


def test_every_recipe_is_valid(tmp_path: Path):
    blocks = [
        (page, block)
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    ]
    assert len(blocks) >= 5
    for page, block in blocks:
        text = block
        if "source:" not in re.sub(r"^ .*$", "", block, flags=re.MULTILINE):
            text += "source: model\n"
        if not re.search(r"^data:", block, flags=re.MULTILINE):
            text += "data: {source: {kind: python-docs}}\n"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        assert load_recipe(recipe).recipe.variants, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_places_of_a_machine(page: Path):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/tmp/|/work/|\bissue #?[0-9]", text)
