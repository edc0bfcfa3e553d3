"""Limits, on figures made by hand: what breaks one, and in which words."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from told import tells

from dense2moe.export.parity.advice import advise
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Forward
from dense2moe.export.parity.limits import configured_limits, noise_limit
from dense2moe.export.parity.place import PlacePart
from dense2moe.export.parity.records import (
    Agreement,
    Check,
    FilesCheck,
    FreeRun,
    Limit,
    PlaceCheck,
    ProviderParity,
    Tier,
    WeightsCheck,
    WrongRows,
)
from dense2moe.export.parity.verdicts import find_breaches
from dense2moe.export.parity.ways.cases import Case
from dense2moe.export.parity.ways.feeding import measure_errors
from dense2moe.export.runtime.decoder import CUDA
from dense2moe.export.variant import Variant
from dense2moe.upcycle.gates.gate import TopK
from dense2moe.upcycle.tasks.figure import Figure

# those need text
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant not in ("int8-qdq", "mixed"))


def figures(perplexity: float) -> tuple[Figure, ...]:
    return (Figure("perplexity", perplexity, "", "lower"),)


SAME = Agreement(
    max_error=0.0,
    mean_error=0.0,
    kl=0.0,
    top1_agreement=1.0,
    routing_agreement=(1.0, 1.0, 1.0),
    hidden_error=(0.0, 1e-6, 2e-6),
)
FIGURES = ProviderParity(
    onnxruntime="1.32.0",
    checks=(Check("prefill", 8, 0.0, 0.0, 1e-6, 1.0, 0), Check("decode", 8, 0.0, 0.0, 1e-6, 1.0, 0, decoded=True)),
    twin=SAME,
    finetuned=SAME,
    figures=figures(10.0),
    twin_figures=figures(10.0),
    finetuned_figures=figures(10.0),
    worst_layer=2,
    prefill_tokens_per_second=1.0,
    decode_tokens_per_second=1.0,
    weights=WeightsCheck(100, 5, 0, ()),
    limits={"logits": Limit(1e-5, "by hand"), **configured_limits("int8", True, ParityConfig())},
)
WORST = "(worst layer 2: routing agreement 1.0000, hidden error 2.0e-06)"


def breaches_of(**changes: Any) -> list[tuple[Tier, str]]:
    return find_breaches(replace(FIGURES, **changes))


def test_figures_within_every_limit_break_none() -> None:
    assert breaches_of() == []


def test_figures_at_a_limit_do_not_break_it() -> None:
    limits = {"logits": Limit(1e-6, ""), "kl": Limit(0.0, ""), "routing": Limit(1.0, ""), "perplexity": Limit(0.0, "")}
    assert breaches_of(limits=limits) == []


def test_every_breach_is_one_line_that_names_tier_and_worst_layer() -> None:
    changes = {
        "checks": (
            replace(FIGURES.checks[0], relative_error=0.25, first_position=0),
            replace(FIGURES.checks[1], relative_error=0.5),
        ),
        "twin": replace(SAME, kl=0.03, routing_agreement=(1.0, 0.5, 0.25), hidden_error=(0.0, 0.5, 0.75)),
        "figures": figures(10.5),
    }
    worst = "(worst layer 2: routing agreement 0.2500, hidden error 7.5e-01)"
    assert breaches_of(**changes) == [
        ("logits", f"prefill: relative error 2.5e-01 > 1.0e-05, from token 0 on {worst}"),
        ("logits", f"decode: relative error 5.0e-01 > 1.0e-05 {worst}"),
        ("language", f"KL from the twin 3.0e-02 > 1e-03 {worst}"),
        (
            "language",
            "perplexity 10.5000 is +5.00% ± 0.00% of the fine-tuned model's; at most +0.50% and two standard errors "
            f"{worst}",
        ),
        ("routing", f"routing agreement with the twin 0.2500 < 0.97 {worst}"),
    ]
    without_logits = configured_limits("int8", True, ParityConfig())
    assert breaches_of(**changes, limits=without_logits) == breaches_of(**changes)[2:]


def test_a_check_s_errors_that_only_decoding_has_point_to_the_cache() -> None:
    checks = (FIGURES.checks[0], replace(FIGURES.checks[1], relative_error=0.5, first_position=7))
    hint = "(every prefill is right: look at the KV cache and the positions of decoding)"
    assert breaches_of(checks=checks) == [
        ("logits", f"decode: relative error 5.0e-01 > 1.0e-05, from token 7 on {hint}")
    ]


def test_a_check_that_is_wrong_where_others_are_right_is_told_apart_from_what_is_wrong_further_on() -> None:
    """A graph whose keys are wrong far along a row, and whose steps are wrong at once."""
    place = "layer 0, the cached keys and values, on the graph's own input: relative error 2.0e-03 > 1.0e-03"
    far = replace(FIGURES.checks[0], name="long prefill", place=place, first_position=95)
    step = replace(FIGURES.checks[1], relative_error=0.5, first_position=32)
    padded = replace(far, name="padded", padded=True, place=None, relative_error=0.5, first_position=3)
    lines = [line.partition(" (")[2] for _, line in breaches_of(checks=(*FIGURES.checks, far, step, padded))]
    assert lines == [
        "every token before 95 is right: look at positions and rotary tables)",
        "every prefill is right before token 95: look at the KV cache and the positions of decoding)",
        "every row without padding is right before token 32: look at left padding, its mask and positions)",
    ]
    (line,) = (line for _, line in breaches_of(checks=(replace(far, first_position=0),)))
    assert line == f"long prefill: {place}, from token 0 on"


def test_greedy_text_may_differ_where_two_tokens_are_as_likely() -> None:
    # two logits, each off by 1e-5
    tied = FreeRun(num_rows=3, num_tokens=32, shortest_prefix=5, mean_prefix=20.0, num_diverged=1, largest_gap=2e-5)
    assert breaches_of(free_run=tied) == []
    line = (
        "greedy text differs after 5 of 32 tokens, where the reference's choice is ahead by 3.0e-05 > 2.0e-05 of "
        f"the largest logit {WORST}"
    )
    assert breaches_of(free_run=replace(tied, largest_gap=3e-5)) == [("logits", line)]
    # other weights write another text
    assert breaches_of(free_run=replace(tied, largest_gap=0.5), weights="not judged") == []
    assert breaches_of(free_run=replace(tied, largest_gap=0.5), tie_share=0.9) == []


WRONG = PlaceCheck(layer=1, part="experts", error=0.5, limit=1e-5, noise=1e-7, num_tokens=9)


def test_an_operator_is_named_with_its_experts() -> None:
    given = "on the graph's own input"
    right = "its weights are all in the file: look at"
    look = (
        f"({right} the order of experts and of gate and up, the activation, biases, and what router logits become "
        "as weights of experts)"
    )
    expected = {
        (): f"layer 1, experts, none of them in every token, {given}: relative error 5.0e-01 > 1.0e-05 {look}",
        (2,): f"layer 1, expert 2 {given}: relative error 5.0e-01 > 1.0e-05 {look}",
        (0, 3): f"layer 1, experts 0, 3 {given}: relative error 5.0e-01 > 1.0e-05 {look}",
    }
    fine = replace(WRONG, layer=0, error=1e-5)
    for experts, line in expected.items():
        assert breaches_of(places=(fine, replace(WRONG, experts=experts))) == [("operator", line)]
    line = (
        f"layer 1, router logits {given}: relative error 3.0e-02 > 1.0e-05 ({right} its bias, what it reads, and "
        "the type that it is computed in)"
    )
    assert breaches_of(places=(replace(WRONG, part="router", error=0.03),)) == [("operator", line)]
    straight = replace(WRONG, experts=(0, 1, 2), factors=(0.5, 0.75))
    line = (
        "layer 1, experts, each token's output a multiple of the twin's, 0.50 to 0.75 times (are the weights "
        f"renormalized?), {given}"
    )
    assert breaches_of(places=(straight,)) == [("operator", f"{line}: relative error 5.0e-01 > 1.0e-05 {look}")]


def test_a_layer_names_the_first_place_of_each_kind() -> None:
    attention, head = replace(WRONG, part="attention"), replace(WRONG, layer=-1, part="head")
    given, error = "on the graph's own input: relative error", "5.0e-01 > 1.0e-05"
    scale, bias = (
        "look at the scale and the mask of attention, and the order of its heads",
        "a factor, a cap or a bias after it",
    )
    bias = f"its weights are all in the file: look at {bias}"
    alike = replace(head, error=1e-6, factor=1.001, factor_limit=2e-4)
    expected = {
        (attention,): f"layer 1, attention, from its queries, keys and values, {given} {error} ({scale})",
        (replace(attention, layer=0), attention, replace(attention, layer=2)): (
            f"layer 0, attention, from its queries, keys and values, {given} {error}; and in 2 more layers ({scale})"
        ),
        (replace(attention, first_position=1),): (
            f"layer 1, attention, from its queries, keys and values, {given} {error}, from token 1 on (a token that "
            "reads itself alone is right: "
            "look at positions and rotary tables)"
        ),
        (replace(attention, first_position=7),): (
            f"layer 1, attention, from its queries, keys and values, {given} {error}, from token 7 on (every token "
            "before 7 is right: look at the "
            "window and the mask of attention)"
        ),
        (replace(WRONG, part="cache", first_position=1),): (
            f"layer 1, the cached keys and values, {given} {error}, from token 1 on (the first token is "
            "right: look at positions and rotary "
            "tables)"
        ),
        (replace(WRONG, part="cache", first_position=32),): (
            f"layer 1, the cached keys and values, {given} {error}, from token 32 on (every token before 32 "
            "is right: look at positions and "
            "rotary tables)"
        ),
        (replace(head, first_position=4),): f"the head, {given} {error}, from token 4 on ({bias})",
        (
            replace(head, error=0.02, factor=1.02),
        ): f"the head, {given} 2.0e-02 > 1.0e-05, 1.02 times the twin's ({bias})",
        (alike,): f"the head, {given} common to all tokens 1.0e-03 > 2.0e-04, 1.001 times the twin's ({bias})",
    }
    for places, line in expected.items():
        assert breaches_of(places=places) == [("layer", line)]
    both = breaches_of(places=(attention, replace(attention, layer=2), head))
    assert [line.split(",")[0] for _, line in both] == ["layer 1", "the head"]
    assert breaches_of(places=(replace(alike, factor=1.0001),)) == []
    assert [tier for tier, _ in breaches_of(places=(replace(head, error=math.nan),))] == ["layer"]


def test_what_is_known_of_a_place_s_weights_says_where_to_look() -> None:
    right = WeightsCheck(8, 8, 0, ())
    norm, head = replace(WRONG, part="FFN norm"), replace(WRONG, layer=-1, part="head")
    experts = WeightsCheck(8, 8, 1, (WrongRows("layer 1, expert 2, w2", 0, 1, 4, "is all zeros in the file"),))
    assert advise(norm, right) == (
        "its weights are all in the file: look at epsilon, whether 1 is added to the weight, and which values it reads"
    )
    assert advise(WRONG, experts) == "its weights in the file are not the twin's: look at these first"
    # more may be wrong than the first few that are told
    assert advise(replace(WRONG, layer=11), experts).startswith("look at the order of experts")
    assert advise(head, replace(right, not_judged=("lm_head.weight",))) == "look at a factor, a cap or a bias after it"
    lost = WeightsCheck(8, 8, 1, (WrongRows("the head", 3, 1, 9, "no row of the file equals the twin's"),))
    assert tells(advise(head, lost), "weights in the file", "first")
    assert advise(replace(WRONG, part="attention", first_position=1), right).startswith(
        "a token that reads itself alone is right"
    )
    assert {advise(replace(WRONG, part=part), "not judged").startswith("look at ") for part in get_args(PlacePart)} == {
        True
    }


def test_logits_that_are_no_numbers_are_no_logits_that_are_left_out() -> None:
    """Also where routers say no numbers either, whose choices would else count as flips."""
    ids = torch.ones(1, 4, dtype=torch.int64)
    case = Case("decode", ids, torch.tensor([[0, 1, 1, 1]]), 2)
    lost, routers = torch.full((1, 4, 5), math.nan), (torch.full((1, 4, 3), math.nan),)
    forward = Forward(lost, routers, (torch.zeros(1, 4, 1),), (), TopK(2))
    for share in (1.0, 0.7):
        assert math.isnan(measure_errors(case, forward, forward, share=share).check.relative_error)
    right = Forward(torch.cat([lost[:, :1], torch.ones(1, 3, 5)], 1), (), (), (), None)
    assert measure_errors(case, right, right).check.relative_error == 0  # padding may be anything


def test_a_way_of_feeding_is_named_with_the_place_inside() -> None:
    where = (
        "layer 1, attention, from its queries, keys and values, on the graph's own input: relative error 5.0e-01 "
        "> 1.0e-05"
    )
    checks = (FIGURES.checks[0], replace(FIGURES.checks[1], place=where, first_position=7))
    hint = "(every prefill is right: look at the KV cache and the positions of decoding)"
    assert breaches_of(checks=checks) == [("logits", f"decode: {where}, from token 7 on {hint}")]


def test_logits_that_are_all_larger_are_named() -> None:
    limits = {**FIGURES.limits, "factor": Limit(1e-3, "")}
    line = "logits are 1.002 times the twin's; the factor may differ from 1 by 1.0e-03 at most"
    assert breaches_of(limits=limits, logits_factor=1.002) == [("logits", line)]
    assert breaches_of(limits=limits, logits_factor=0.9991) == breaches_of(limits=limits, logits_factor=None) == []
    assert [tier for tier, _ in breaches_of(limits=limits, logits_factor=math.nan)] == ["logits"]


def test_wrong_rows_and_files_have_a_line_each_and_what_is_more_is_counted() -> None:
    wrong = (
        WrongRows("layer 1, expert 2, w2", 0, 32, 32, "the whole row in the file is 1.02 times the twin's"),
        WrongRows("the embedding", 7, 1, 300, "is all zeros in the file"),
        WrongRows("layer 0, attention norm", 0, 1, 1, "element 7 in the file is 1.01 times the twin's"),
    )
    files = FilesCheck(differences=("config.json: 'eos_token_id' is 2; the checkpoint's is 1",))
    assert breaches_of(weights=WeightsCheck(1000, 5, 40, wrong), files=files) == [
        (
            "weights",
            "layer 1, expert 2, w2: 32 of 32 rows differ from the twin's; row 0: the whole row in the file is 1.02 "
            "times the twin's",
        ),
        ("weights", "the embedding, row 7: is all zeros in the file"),
        ("weights", "layer 0, attention norm: element 7 in the file is 1.01 times the twin's"),
        ("weights", "6 more rows of 1,000 differ from the twin's"),
        ("files", "config.json: 'eos_token_id' is 2; the checkpoint's is 1"),
    ]
    assert breaches_of(weights=WeightsCheck(1000, 5, 0, ()), files=FilesCheck()) == []


def test_perplexity_is_held_to_the_variants_own_limit() -> None:
    config = ParityConfig(max_perplexity_increase={"int8": 0.01, "int4": 0.03})
    breach = (
        "language",
        "perplexity 10.2000 is +2.00% ± 0.40% of the fine-tuned model's; at most +1.00% and two standard errors "
        f"{WORST}",
    )
    limits = {variant: configured_limits(variant, True, config) for variant in VARIANTS}
    assert {
        variant: breaches_of(figures=figures(10.2), figures_error=0.004, limits=limits[variant]) for variant in VARIANTS
    } == {
        "float32": [],
        "float16": [],
        "bfloat16": [],
        "int8": [breach],
        "int4": [],
    }
    assert breaches_of(figures=figures(10.2), figures_error=0.006, limits=limits["int8"]) == []  # which chance explains
    assert breaches_of(figures=figures(9.0), limits=limits["int8"]) == []  # better is no breach
    assert len(breaches_of(figures=figures(10.2), figures_error=math.nan, limits=limits["int8"])) == 1


def test_a_figure_that_is_better_the_higher_may_not_fall() -> None:
    def accuracy(value: float) -> tuple[Figure, ...]:
        return (Figure("accuracy", value, "", "higher"),)

    changes = {
        "figures": accuracy(0.72),
        "finetuned_figures": accuracy(0.8),
        "figures_error": 0.01,
        "limits": {"accuracy": Limit(0.05, "")},
    }
    (breach,) = breaches_of(**changes)
    assert breach[1].startswith(
        "accuracy 0.7200 is -10.00% ± 1.00% of the fine-tuned model's; at least -5.00% and two standard errors "
    )
    assert breaches_of(**changes | {"figures": accuracy(0.75)}) == []
    assert breaches_of(**changes | {"figures": accuracy(0.9)}) == []


ERROR = "± 0.00% of the fine-tuned model's; at most +0.50% and two standard errors"


@pytest.mark.parametrize(
    ("changes", "tier", "start"),
    [
        (
            {"checks": (replace(FIGURES.checks[0], relative_error=math.nan),)},
            "logits",
            "prefill: relative error nan > 1.0e-05",
        ),
        ({"twin": replace(SAME, kl=math.nan)}, "language", "KL from the twin nan > 1e-03"),
        ({"figures": figures(math.nan)}, "language", f"perplexity nan is +nan% {ERROR}"),
        ({"figures": figures(math.inf)}, "language", f"perplexity inf is +inf% {ERROR}"),
    ],
)
def test_what_is_not_a_number_breaks_its_limit(changes: dict[str, Any], tier: Tier, start: str) -> None:
    assert breaches_of(**changes) == [(tier, f"{start} {WORST}")]


def test_a_limit_is_a_multiple_of_the_noise_and_says_so() -> None:
    config = ParityConfig(noise_multiple=10, max_relative_error=1e-4)
    limit = noise_limit(3e-7, config, "the logits")
    assert limit.value == pytest.approx(3e-6)
    assert limit.origin == "10 times 3.0e-07, float32 torch's own error against float64 in the logits on this text"
    assert noise_limit(0.0, config, "the logits").value == pytest.approx(10 * 2.0**-24)  # no sum is rounded to less
    assert noise_limit(3e-5, config, "the logits") == Limit(
        1e-4, "parity.max_relative_error; 10 times the noise of float32 in the logits would be 3.0e-04"
    )
    assert noise_limit(3e-7, config, "the logits", CUDA).value == 1e-4
    assert noise_limit(None, config, "x") == Limit(
        1e-4, "parity.max_relative_error; the noise of float32 in x was not measured"
    )
