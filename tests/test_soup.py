"""A greedy soup keeps the models that a loop over whole models keeps, and tells every look."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import fine_tune
from mixtures import EXACT, MakeDense, load, logits, quiet
from report_facts import make_facts
from safetensors.torch import load_file, save_file

from dense2moe import api
from dense2moe.convert.report.facts import read_facts
from dense2moe.convert.report.merging_tables import distance_table, soup_table
from dense2moe.convert.report.verdicts import verdict_lines
from dense2moe.upcycle.building.config import MergingConfig, UpcycleConfig
from dense2moe.upcycle.building.plan import plan_upcycle
from dense2moe.upcycle.building.soup import add_greedily, choose_soup
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.data.blocks import FACTS_NAME
from dense2moe.upcycle.errors import UpcycleError

SOUP = MergingConfig(method="greedy-soup")
FAMILIES: dict[str, dict[str, Any]] = {
    "tied": EXACT,
    "fused, untied": {**EXACT, "architecture": "Phi3ForCausalLM", "tie_word_embeddings": False},
}


AMOUNTS = {"a": 0.1, "far": 1.0, "b": 0.1}
"""How far sources are from the base. Text that the base wrote is nothing for them; two near ones do better together."""


def fine_tunes(base: Path, folder: Path) -> dict[str, Path]:
    return {name: fine_tune(base, folder / name, seed, amount) for seed, (name, amount) in enumerate(AMOUNTS.items())}


def blocks(base: Path) -> torch.Tensor:
    """Text that the base itself finds likely: greedy after a drawn token."""
    start = torch.randint(300, (6, 1), generator=torch.Generator().manual_seed(5))
    made: torch.Tensor = load(base).generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=23,
        min_new_tokens=23,
        pad_token_id=0,
    )
    return made


@torch.no_grad()
def loss_of(state: dict[str, torch.Tensor], base: Path, ids: torch.Tensor) -> float:
    """By plain transformers, of a model with these weights."""
    model = load(base)
    model.load_state_dict(state, strict=False)
    return float(model(input_ids=ids, labels=ids).loss)


def slow_soup(base: Path, models: dict[str, Path], ids: torch.Tensor) -> tuple[list[str], list[float]]:
    """Recipe 1 of the paper over whole checkpoints; the models, and the losses of all looks."""
    states = {name: load_file(path / "model.safetensors") for name, path in models.items()}

    def loss(names: list[str]) -> float:
        return loss_of(
            {key: sum(states[name][key] for name in names) / len(names) for key in states[names[0]]}, base, ids
        )  # type: ignore[misc]

    alone = {name: loss([name]) for name in models}
    soup: list[str] = []
    losses, least = list(alone.values()), math.inf
    for name in sorted(models, key=lambda each: alone[each]):
        found = loss([*soup, name])
        losses += [found] if soup else []
        if found <= least:
            soup, least = [*soup, name], found
    return soup, losses


@pytest.mark.parametrize("base_expert", ["none", "routed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_keeps_what_a_loop_over_whole_models_keeps(
    family: str, base_expert: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(**FAMILIES[family])
    sources, ids = fine_tunes(base, tmp_path), blocks(base)
    models = ({"": base} if base_expert == "routed" else {}) | sources
    expected, losses = slow_soup(base, models, ids)
    assert sorted(expected) == ([""] if base_expert == "routed" else ["a", "b"])  # or little is decided
    checkpoint = open_checkpoint(base)
    opened = open_sources(checkpoint, sources)
    plan = plan_upcycle(checkpoint, UpcycleConfig(merging=SOUP, base_expert=base_expert), opened)
    kept, looks = choose_soup(checkpoint, opened, plan, ids, quiet)
    assert [("", *sources)[number] for number in kept] == expected
    assert [look.loss for look in looks] == pytest.approx(losses, rel=1e-6)
    assert list(next(look.models for look in reversed(looks) if look.kept)) == expected
    assert [look.models[-1] for look in looks[: len(models)]] == list(models)


def test_a_model_stays_where_the_loss_is_no_higher() -> None:
    losses = {(0,): 3.0, (1,): 2.0, (2,): 2.5, (3,): math.nan, (1, 2): 2.0, (1, 2, 0): 2.1, (1, 2, 3): math.nan}
    found = add_greedily(range(4), losses.__getitem__)
    assert [numbers for numbers, _, kept in found if kept] == [(1,), (1, 2)]
    assert len(found) == 7
    assert found[-1][1:] == (math.inf, False)


def prepare(base: Path, output: Path) -> Path:
    """As `prepare_data` writes it, every split the same text."""
    output.mkdir()
    ids = blocks(base).to(torch.int32)
    for split in ("train", "validation", "test"):
        given = {"input_ids": ids, "domains": torch.zeros(len(ids), dtype=torch.int32)}
        save_file(given, output / f"{split}.safetensors")
    (output / FACTS_NAME).write_text(json.dumps({"domains": ["text"]}))
    return output


@pytest.mark.usefixtures("receipts_in_float32")
@pytest.mark.parametrize("base_expert", ["none", "routed"])
def test_the_rest_is_the_mean_of_the_soup_and_experts_stay_everyone_s(
    base_expert: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(**EXACT)
    sources, data = fine_tunes(base, tmp_path), prepare(base, tmp_path / "data")
    settings = UpcycleConfig(merging=SOUP, base_expert=base_expert)
    made = api.upcycle(base, tmp_path / "out", settings, data=data, sources=sources)
    kept = [look.models for look in made.soup if look.kept][-1]
    found = load_file(tmp_path / "out" / "model.safetensors")
    states = {name: load_file(path / "model.safetensors") for name, path in ({"": base} | sources).items()}
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        mean = sum(states[model][name].double() for model in kept) / len(kept)
        torch.testing.assert_close(found[name].double(), mean, rtol=0, atol=1e-6)
    for number, source in enumerate(("", *sources) if base_expert == "routed" else sources):
        expert = found[f"model.layers.1.block_sparse_moe.experts.{number}.w1.weight"]
        assert torch.equal(expert, states[source]["model.layers.1.mlp.gate_proj.weight"])
    told = (
        "'greedy-soup' of the dense model,"
        if base_expert == "routed"
        else f"'greedy-soup' of {', '.join(sorted(kept))},"
    )
    assert any(told in note for note in made.receipt.notes)


@pytest.mark.usefixtures("receipts_in_float32")
def test_two_sources_equal_to_the_base_give_the_base_bit_for_bit(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    settings = UpcycleConfig(merging=SOUP, router=api.RouterConfig(logit_std=0.0))
    sources = {"a": base, "b": base}
    made = api.upcycle(base, tmp_path / "out", settings, data=prepare(base, tmp_path / "data"), sources=sources)
    assert [look.kept for look in made.soup] == [True, False, True]  # as good as before is good enough
    assert torch.equal(logits(tmp_path / "out"), logits(base))


def test_it_needs_held_out_text_and_a_decoder(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    with pytest.raises(UpcycleError, match="method 'greedy-soup' chooses by held-out loss; give `data`"):
        api.upcycle(base, tmp_path / "out", UpcycleConfig(merging=SOUP), sources={"a": base, "b": base})
    t5 = open_checkpoint(make_dense(architecture="T5ForConditionalGeneration"))
    with pytest.raises(UpcycleError, match=r"upcycle\.merging\.method is greedy-soup; SwitchTransformers"):
        plan_upcycle(t5, UpcycleConfig(merging=SOUP, num_experts_per_tok=1), {"a": t5, "b": t5})


def test_the_report_says_what_was_kept_and_every_look() -> None:
    found = make_facts()
    looks = [(("stubs",), 2.5, False), (("law",), 2.25, True), (("",), 3.0, False)]
    looks += [(("law", "stubs"), 2.125, True), (("law", "stubs", ""), 2.375, False)]
    found["upcycle"] |= {
        "experts": ["", "stubs", "law"],
        "merging": "greedy-soup",
        "distances": [
            {"name": name, "by_class": {"ffn": 0.1, "head": 0.02}, "equal": False} for name in ("stubs", "law")
        ],
        "soup": [{"models": list(models), "loss": loss, "kept": kept} for models, loss, kept in looks],
    }
    facts = read_facts(found, "run")
    assert (
        "Outside of experts the greedy soup averaged law + stubs (held-out loss 2.1250 nats; the best alone, law, "
        "2.2500), and left out the dense model (2.3750 with it)." in verdict_lines(facts)
    )
    assert soup_table(facts.upcycle).rows[2:] == (
        ("the dense model", "3.0000", "tried"),
        ("law + stubs", "2.1250", "kept"),
        ("law + stubs + the dense model", "2.3750", "tried"),
    )
    assert distance_table(facts.upcycle).rows[1] == ("law", "1", "10 %", "2.00 %")
    found["upcycle"]["soup"] = [
        {"models": ["stubs"], "loss": 2.5, "kept": True},
        {"models": ["stubs", "law"], "loss": 2.625, "kept": False},
    ]
    line = (
        "Outside of experts the greedy soup is stubs alone (held-out loss 2.5000 nats), and left out law (2.6250 with "
        "it)."
    )
    assert line in verdict_lines(read_facts(found, "run"))
