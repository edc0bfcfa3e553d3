"""Recipes of the repository: each loads; what merging reads is there; and each runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixtures import quiet
from programs import dense2moe

from dense2moe.convert.checking import prepare
from dense2moe.convert.recipe.loading import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recipe needs to be run from the repository."""
    monkeypatch.chdir(tmp_path)


each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@each_recipe
def test_every_recipe_loads_and_says_what_it_is(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.name == path.stem
    assert loaded.text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# ")


def test_adapters_of_this_repository_are_sources_of_its_model() -> None:
    """By all that a run checks before it begins: names, ranks, tokenizers, domains."""
    (path,) = (path for path in RECIPES if path.stem == "merge-adapters")
    found = prepare(load_recipe(path), quiet)
    assert found.plan.sources == tuple(found.recipe.data.source.domains)
    assert found.plan.owners == (1, 2, 3, 4)
    assert found.remarks == ()


@pytest.mark.recipes
@each_recipe
def test_every_recipe_runs_as_it_stands(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "recipes" not in request.config.option.markexpr:
        pytest.skip("takes minutes: pytest -m recipes")
    finished = dense2moe("run", path, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.output
