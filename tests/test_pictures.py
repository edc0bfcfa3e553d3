"""Claims about the report's pictures and their captions."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from report_facts import make_facts, records, searched, tiered

from dense2moe.convert.report.pictures.drawing import Picture
from dense2moe.convert.report.pictures.selection import plan_pictures
from dense2moe.convert.report.summary import summarize

PHASE_DASH = "1.2,1.2"


@pytest.fixture
def facts() -> dict[str, Any]:
    return make_facts()


def picture(facts: dict[str, Any], title: str) -> Picture:
    found = records(facts)
    return plan_pictures(found, summarize(found))[title]()


def titles(facts: dict[str, Any]) -> set[str]:
    found = records(facts)
    return set(plan_pictures(found, summarize(found)))


def test_the_training_curve_shows_the_mixture_and_both_controls(facts):
    drawn = picture(facts, "Training")
    assert (
        "reached 2.430 for the mixture, 2.520 for the dense model with the same tokens and 2.490 for the dense "
        "model with the same FLOPs;" in drawn.caption
    )
    for label in ("mixture", "dense, same tokens", "dense, same FLOPs"):
        assert f">{label}<" in drawn.svg


def test_the_training_curve_marks_where_phases_begin(facts):
    ends = {
        (s["model"], s["num_tokens"]) for s in facts["finetune"]["history"] if s["step"] in (40, 60) and s["phase"] == 0
    }
    places = {tokens for _, tokens in ends}
    assert len(places) == 2  # the mixture's and its equal in tokens, and that of equal compute
    drawn = picture(facts, "Training")
    assert drawn.svg.count(f"stroke-dasharray: {PHASE_DASH}") == len(places)
    assert "where a phase begins" in drawn.caption


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (None, "The mixture ends 0.100 nats behind the dense model with as many operations."),
        (3e12, "From 3.00 TFLOP on, the grey line, the mixture is ahead of the dense model with as many."),
    ],
)
def test_losses_are_drawn_against_operations_where_the_history_tells_them(facts, at, told):
    assert "Loss and compute" not in titles(facts)
    for step in facts["finetune"]["history"]:
        step["flops"] = 5e10 * step["step"]
    crossing = {"begin": 1e12, "end": 6e12, "at": at, "first_gap": 0.2, "last_gap": 0.1 if at is None else -0.1}
    facts["finetune"]["crossings"] = {"dense, same FLOPs": crossing}
    drawn = picture(facts, "Loss and compute")
    assert drawn.caption.startswith(told)
    assert ">dense, same FLOPs<" in drawn.svg


def test_the_mixture_s_curve_begins_behind_its_branches(facts):
    assert "branches" not in picture(facts, "Training").caption
    facts["finetune"]["spent"] = {"num_tokens": 1000, "flops": 1e9, "seconds": 1.0, "compute_seconds": 1.0}
    assert "the mixture's curve begins behind the tokens of its branches" in picture(facts, "Training").caption


def test_one_phase_is_not_marked(facts):
    for step in facts["finetune"]["history"]:
        step["phase"] = 0
    for title in ("Training", "Load over training", "Experts coming apart", "Routers over training"):
        drawn = picture(facts, title)
        assert PHASE_DASH not in drawn.svg
        assert "phase" not in drawn.caption


def test_the_specialization_names_the_expert_that_tells_domains_apart_most(facts):
    drawn = picture(facts, "Specialization")
    assert drawn.caption == (
        "From one domain to another 11 % of a layer's load moves to other experts, from one half of a domain to the "
        "other 2.00 %, so the experts "
        "know the domains (mutual information of expert and domain: 0.20 of at most 0.69 nats); the greatest "
        "difference is expert 1 of layer 2, with 1.60 times its fair share of prose "
        "and 0.60 times of code."
    )
    cells = re.findall(r">(\d\.\d\d)<", drawn.svg)
    shares = [
        share
        for layers in zip(*facts["finetune"]["domains"]["loads"].values(), strict=True)
        for layer in layers
        for share in layer
    ]
    assert cells == [f"{4 * share:.2f}" for share in shares]


def test_the_specialization_names_layers_by_their_place_in_the_model(facts):
    facts["finetune"]["sparse_layers"] = [3, 5, 7, 9]
    assert "expert 1 of layer 7" in picture(facts, "Specialization").caption


@pytest.mark.parametrize(
    ("within", "finding"), [(0.05, "know"), (0.1, "hardly know"), (0.1125, "do not know"), (0.2, "do not know")]
)
def test_domains_are_known_where_they_are_further_apart_than_halves_of_one(facts, within, finding):
    facts["finetune"]["domains"]["within"] = [within] * 4
    assert f"so the experts {finding} the domains" in picture(facts, "Specialization").caption


def test_names_of_domains_are_shortened_and_escaped(facts):
    loads = facts["finetune"]["domains"]["loads"]
    loads["$<b>"] = loads["code"]
    loads["a domain with a long name"] = loads["prose"]
    svg = picture(facts, "Specialization").svg
    assert ">$&lt;b&gt;<" in svg
    assert ">a domain w…<" in svg
    assert "long name" not in svg


def test_experts_by_label_are_drawn_of_the_layer_that_knows_labels_best(facts):
    assert "Experts by label" not in titles(facts)
    loads = {"O": [[0.25] * 4, [0.2, 0.3, 0.25, 0.25]], "B-$<b>": [[0.25] * 4, [0.6, 0.0, 0.2, 0.2]]}
    facts["finetune"]["labels"] = {"loads": loads, "information": [0.0, 0.15]}
    facts["finetune"]["sparse_layers"] = [3, 5]
    drawn = picture(facts, "Experts by label")
    assert drawn.caption == (
        "Of all layers the experts of layer 5 know most of the labels (mutual information of expert and label: 0.15 of "
        "at most 0.69 nats): expert 0 gets 2.40 times its fair share of B-$<b> and 0.80 times of O."
    )
    assert re.findall(r">(\d\.\d\d)<", drawn.svg) == ["0.80", "1.20", "1.00", "1.00", "2.40", "0.00", "0.80", "0.80"]
    assert ">B-$&lt;b&gt;<" in drawn.svg


def test_of_many_labels_those_that_differ_are_drawn(facts):
    loads = {f"label {n}": [[0.25] * 4] for n in range(20)} | {"odd": [[1.0, 0.0, 0.0, 0.0]]}
    facts["finetune"]["labels"] = {"loads": loads, "information": [0.1]}
    facts["finetune"]["sparse_layers"] = [0]
    drawn = picture(facts, "Experts by label")
    assert drawn.caption.endswith("Drawn are the 16 labels of 21 that differ most from the rest.")
    assert ">odd<" in drawn.svg
    assert drawn.svg.count(">label ") == 15


def test_without_domains_there_is_no_specialization(facts):
    facts["finetune"]["domains"] = None
    assert "Specialization" not in titles(facts)


def test_the_experts_distance_is_the_mean_over_layers(facts):
    assert picture(facts, "Experts coming apart").caption == (
        "At 0 a layer's experts are copies, at 1 they have nothing in common: the mean over layers, with the range "
        "of all, went from 0.015 to 0.06, "
        "furthest in layer 2 (0.08)."
    )


def test_copies_have_no_distance(facts):
    for step in facts["finetune"]["history"]:
        for layer in step["layers"]:
            layer["cosine"] = 1.0000001
    assert "went from 0 to 0, furthest" in picture(facts, "Experts coming apart").caption


def test_the_routers_entropy_is_relative_to_chance(facts):
    share = (1.2 + 1.3) / 2 / math.log(4)
    assert (
        f"the mean entropy went from {share:.2f} to {share:.2f}, the margin from 0.15 to 0.30."
        in picture(facts, "Routers over training").caption
    )


def test_a_router_with_one_expert_is_not_drawn(facts):
    for step in facts["finetune"]["history"]:
        for layer in step["layers"]:
            layer.update(load=[1.0], entropy=0.0)
    assert not titles(facts) & {"Experts coming apart", "Routers over training"}


def test_the_margins_say_how_many_flips_were_nearly_ties(facts) -> None:
    """Of int4's flips, 32 % of 40, 12 % of 400 and 4 % of 3000 are in the lower half of the bins: all of them."""
    drawn = picture(tiered(facts), "Router margins and flips")
    flips = round(0.32 * 40 + 0.12 * 400 + 0.04 * 3000)
    assert f"of the {flips} flips of int4 in 23,440 choices 100 % had a margin below 0.1." in drawn.caption


def test_without_a_flip_the_margins_say_so(facts) -> None:
    for variant in tiered(facts)["variants"].values():
        for found in variant["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["margins"]:
            found["agreement"] = 1.0 if found["num_choices"] else None
    assert picture(facts, "Router margins and flips").caption == (
        "Of 23,440 choices of experts none came out otherwise than the fine-tuned model's."
    )


def test_facts_without_margins_have_no_picture_of_them(facts) -> None:
    assert "Router margins and flips" not in titles(facts)


def test_tokens_per_second_are_compared_with_torch(facts) -> None:
    drawn = picture(facts, "Tokens per second")
    assert f"ONNX int4 decodes {655 / 97:.1f} times as fast as the fine-tuned model in torch" in drawn.caption
    for speed in ("13,100", "655", "97.0"):
        assert f">{speed}<" in drawn.svg


def test_a_search_shows_its_front_and_what_was_chosen(facts) -> None:
    drawn = picture(searched(facts), "Search of bits, int4")
    assert "Of 4 mixtures of bits" in drawn.caption
    assert (
        f"7.00 MB, its perplexity {100 * (11.5 / 11.24 - 1):.2f} % worse than the reference's (dashed); the limit: "
        "+3 %." in drawn.caption
    )
    assert ">4 bits, attention 8<" in drawn.svg
    for point in facts["variants"]["int4"]["quantize"]["search"]["points"]:
        point["chosen"] = False
    assert "none met the limit: +3 %" in picture(facts, "Search of bits, int4").caption
