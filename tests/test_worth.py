"""The report's first question, and the tables by domain: was it worth it?"""

from __future__ import annotations

import pytest
from report_facts import make_facts, records, set_figure

from dense2moe.convert.report.summary import Verdict
from dense2moe.convert.report.verdicts import judge
from dense2moe.convert.report.worth import domain_table, oracle_table


@pytest.fixture
def facts():
    return make_facts()


TOKENS, COMPUTE = "it continued on the same tokens", "it continued with the same compute"
TUNED = "the mixture's perplexity is 11.23, 24 % better than the dense model as it came (14.88)"


@pytest.mark.parametrize(
    ("tokens", "compute", "expected"),
    [
        (
            12.0,
            11.5,
            Verdict(
                f"Was it worth it? Yes: {TUNED}, 6.38 % better than {TOKENS} (12.00), 2.31 % better than {COMPUTE} "
                "(11.50).",
                True,
            ),
        ),
        (
            12.0,
            11.0,
            Verdict(
                f"Was it worth it? On equal tokens yes, on equal compute not yet: {TUNED}, 6.38 % better than {TOKENS} "
                f"(12.00), 2.13 % worse than {COMPUTE} (11.00).",
                None,
            ),
        ),
        (
            11.2346,
            11.0,
            Verdict(
                f"Was it worth it? No: {TUNED}, less than 0.01 % better than {TOKENS} (11.23), 2.13 % worse than "
                f"{COMPUTE} (11.00).",
                False,
            ),
        ),
    ],
)
def test_the_first_finding_says_whether_it_was_worth_it(facts, tokens, compute, expected):
    set_figure(facts, "dense continued", tokens)
    set_figure(facts, "dense, same FLOPs", compute)
    assert next(judge(records(facts))) == expected


def crossing(at: float | None, first: float, last: float) -> dict[str, float | None]:
    return {"begin": 20.0, "end": 80.0, "at": at, "first_gap": first, "last_gap": last}


@pytest.mark.parametrize(
    ("tokens", "compute", "expected"),
    [
        (
            crossing(20.0, -0.1, -0.2),
            crossing(None, 0.1, 0.05),
            "at equal tokens the mixture is ahead from the first look on; at equal compute the run ended before the "
            "crossing: the mixture is 0.050 nats behind at the end and was 0.100 behind at the first look, so the gap "
            "is closing.",
        ),
        (
            crossing(None, 0.1, 0.3),
            crossing(60.0, 0.1, -0.05),
            "at equal tokens the run ended before the crossing: the mixture is 0.300 nats behind at the end and was "
            "0.100 behind at the first look, so the gap is widening; at equal compute the mixture overtakes after 75 % "
            "of the run.",
        ),
    ],
)
def test_the_first_finding_says_whether_the_run_ended_before_the_crossing(facts, tokens, compute, expected):
    facts["finetune"]["crossings"] = {"dense continued": tokens, "dense, same FLOPs": compute}
    assert next(judge(records(facts))).text.endswith(f" By validation loss, {expected}")


def test_a_mixture_that_is_worse_than_its_parent_was_not_worth_it(facts):
    for model, figure in (("dense", 11.0), ("dense continued", 12.0), ("dense, same FLOPs", 12.0)):
        set_figure(facts, model, figure)
    assert next(judge(records(facts))).good is False


def test_without_a_control_the_question_is_not_answered(facts):
    for model in ("dense continued", "dense, same FLOPs"):
        facts["finetune"]["evaluations"].pop(model)
    assert not next(judge(records(facts))).text.startswith("Was it worth it?")


def test_the_table_by_domain_has_every_model_with_its_mean(facts):
    table = domain_table(records(facts))
    assert table.headers == ("Loss, nats", "prose", "code", "mean")
    assert [row[0] for row in table.rows] == [
        "dense",
        "upcycled",
        "dense continued",
        "dense, same FLOPs",
        "fine-tuned",
    ]
    assert table.rows[-1] == ("fine-tuned", "2.669", "2.169", "2.419")
    for found in facts["finetune"]["evaluations"].values():
        found["domain_losses"] = {}
    assert domain_table(records(facts)).rows == ()


def test_the_table_of_routing_has_the_oracle_below_the_routers(facts):
    table = oracle_table(records(facts).finetune.oracle)
    assert table.rows == (
        ("the routers' choice", "2.500", "2.300", "2.400"),
        ("the domain's best expert alone", "2.600", "2.410", "2.505"),
        ("expert 0 alone", "2.600", "2.900", "2.750"),
        ("expert 1 alone", "2.800", "2.410", "2.605"),
        ("expert 2 alone", "2.900", "2.700", "2.800"),
        ("expert 3 alone", "2.700", "2.500", "2.600"),
        ("experts drawn by chance", "3.000", "2.800", "2.900"),
    )
    assert oracle_table(None).rows == ()
