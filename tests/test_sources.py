"""Sources in a recipe: found, held against the base, linked, merged, told in card and report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fine_tunes import fine_tune
from huggingface_hub import ModelCard
from mixtures import EXACT, MakeDense, experts
from report_facts import make_facts
from rich.console import Console
from safetensors.torch import load_file

from dense2moe.convert.checking import prepare
from dense2moe.convert.planning import plan_artifacts
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.recipe.loading import LoadedRecipe, load_recipe
from dense2moe.convert.report.card import write_card
from dense2moe.convert.report.facts import read_facts
from dense2moe.convert.report.verdicts import verdict_lines
from dense2moe.convert.walk import run_pipeline
from dense2moe.upcycle.errors import MendableError

TEXT = "|".join(f"Document {number} tells of house {number % 7} and its garden." for number in range(200))


@pytest.fixture
def write(make_dense: MakeDense, tmp_path: Path) -> Any:
    """A recipe with two sources beside it; its lines are followed by others."""
    base = make_dense(**EXACT)
    shutil.copytree(base, tmp_path / "base")
    for seed, name in enumerate(("code", "maths")):
        fine_tune(base, tmp_path / name, seed)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def make(*lines: str, sources: str = "{code: code, maths: {path: maths}}") -> LoadedRecipe:
        path = tmp_path / "merged.yaml"
        path.write_text(
            "\n".join(
                (
                    "source: base",
                    f"sources: {sources}",
                    "data: {source: {kind: text, train: [text.txt], separator: '|'}, block_size: 32}",
                    *lines,
                )
            ),
            encoding="utf-8",
        )
        return load_recipe(path)

    return make


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


def test_a_run_makes_the_sources_experts(write: Any, tmp_path: Path) -> None:
    preparation = prepare(write("upcycle: {merging: {method: base}, base_expert: routed}"), quiet)
    assert preparation.recipe.upcycle.num_experts == 3
    with ProgressDisplay(Console(quiet=True)) as display:
        outcome = run_pipeline(preparation, tmp_path / "work", "upcycle", display)
    assert outcome is not None
    made, source = (outcome.artifacts[label] for label in ("upcycle", "source"))
    assert made.facts["experts"] == ["", "code", "maths"]
    assert made.facts["merging"] == "base"
    assert [distance["name"] for distance in made.facts["distances"]] == ["code", "maths"]
    assert not made.facts["keeps_function"]
    assert [(each["name"], each["kind"]) for each in source.facts["sources"]] == [
        ("code", "checkpoint"),
        ("maths", "checkpoint"),
    ]
    linked = source.directory / "sources" / "maths" / "model.safetensors"
    assert linked.is_symlink()
    for expert, directory in zip(experts(made.directory, 1, 3), ("base", "code", "maths"), strict=True):
        own = load_file(tmp_path / directory / "model.safetensors")
        assert expert.up.equal(own["model.layers.1.mlp.up_proj.weight"])


def test_another_source_or_another_order_makes_another_mixture(write: Any, tmp_path: Path) -> None:
    def keys(loaded: LoadedRecipe) -> list[str]:
        return [each.key for each in plan_artifacts(prepare(loaded, quiet), "upcycle")]

    first = keys(write())
    assert keys(write()) == first
    # the text's key follows from the base's alone, but its input is the artifact that holds all of them
    assert keys(write(sources="{maths: maths, code: code}"))[-1] != first[-1]
    fine_tune(tmp_path / "base", tmp_path / "other", 7)
    assert keys(write(sources="{code: other, maths: maths}"))[-1] != first[-1]


@pytest.mark.parametrize(
    ("sources", "lines", "said"),
    [
        ("{code: nowhere, maths: maths}", (), "sources.code: 'nowhere' is not there"),
        ("{code: text.txt, maths: maths}", (), "is a file; it must be a checkpoint directory"),
        ("{code: code, 'a/b': maths}", (), "sources: has the name 'a/b'; must be of the form"),
        ("{}", ("upcycle: {merging: {method: ties}}",), "upcycle.merging: is given without sources"),
        ("{}", ("upcycle: {base_expert: routed}",), "upcycle.base_expert: is given without sources"),
        ("{code: code, maths: maths}", ("upcycle: {num_experts: 3}",), "upcycle.num_experts"),
        (
            "{code: code, maths: maths}",
            ("upcycle: {merging: {method: mean, density: 0.1}}",),
            "method 'mean' has a density; must be ties or dare to have one",
        ),
        ("{code: code}", (), "num_experts_per_tok is 2; it must be at most num_experts, which is 1"),
    ],
)
def test_a_mistake_of_sources_is_told_with_its_key(sources: str, lines: tuple[str, ...], said: str, write: Any) -> None:
    with pytest.raises(MendableError) as excinfo:
        prepare(write(*lines, sources=sources), quiet)
    assert said in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


def test_the_card_lists_all_base_models(package: Path, tmp_path: Path) -> None:
    facts = make_facts()
    told = {"origin": "x", "kind": "checkpoint", "remarks": []}
    facts["source"]["sources"] = [
        {"name": "code", "hub": "someone/coder", **told},
        {"name": "maths", "hub": None, **told, "origin": "../models/maths"},
    ]
    facts["upcycle"] |= {
        "experts": ["code", "maths"],
        "merging": "ties",
        "distances": [{"name": name, "by_class": {"ffn": 0.1}, "equal": False} for name in ("code", "maths")],
    }
    records = read_facts(facts, "here")
    write_card(records, "int8", package, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == [
        "someone/python-docs-4m",
        "someone/coder",
        "maths",
    ]
    merging = "Merging code, maths (all but their experts by 'ties')"
    assert any(line.startswith(merging) for line in verdict_lines(records))
