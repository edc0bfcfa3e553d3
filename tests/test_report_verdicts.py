"""Claims about the report's verdicts: what the numbers say, in sentences that are honest when a run lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outline import Outline
from report_facts import classified, make_facts, records, set_figure, tiered

from dense2moe.convert.report.summary import Verdict
from dense2moe.convert.report.verdicts import judge, verdict_lines
from dense2moe.convert.report.writer import write_report


@pytest.fixture
def facts() -> dict[str, Any]:
    return make_facts()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], str]:
    """The page without its pictures: drawing takes a hundred times as long as all else."""
    monkeypatch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])

    def write(facts: dict[str, Any]) -> str:
        write_report(facts, tmp_path)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_the_verdict_says_that_upcycling_kept_the_perplexity(facts):
    assert (
        verdict_lines(records(facts))[1]
        == "Upcycling kept the perplexity to 4 digits: 14.880 dense, 14.880 upcycled, before any training."
    )


def test_the_verdict_says_that_the_mixture_has_the_dense_models_figures(facts):
    facts["finetune"]["evaluations"]["upcycled"]["same"] = {"model": "dense", "num_blocks": 4, "difference": 2.4e-7}
    assert verdict_lines(records(facts))[1] == (
        "Upcycling kept the perplexity, 14.880: the receipt shows that the mixture computes what the dense model does, "
        "and the losses of 4 held-out blocks, read by both, differ by 2e-07 nats a token at most; so the other blocks "
        "were read by the dense model alone."
    )


def test_the_verdict_says_that_upcycling_changed_the_perplexity(facts):
    set_figure(facts, "upcycled", 14.8903)
    assert (
        verdict_lines(records(facts))[1]
        == "Upcycling did NOT keep the perplexity to 4 digits: 14.880 dense, 14.890 upcycled, before any training."
    )


def test_the_verdict_says_by_how_much_the_control_was_beaten(facts):
    line = verdict_lines(records(facts))[2]
    assert f"lower by {100 * (12.3049 - 11.2345) / 12.3049:.2f} %" in line
    assert "11.23 against 12.30" in line
    assert "NOT" not in line


EQUAL_COMPUTE = "the dense model trained with the same compute"


SPENT = "The control had {} (120 steps, 44.0 s), the mixture 40.0 TFLOP (80 steps, 45.0 s)"


@pytest.mark.parametrize(
    ("control", "text", "good"),
    [
        (12.0, f"The fine-tuned mixture beats {EQUAL_COMPUTE}: perplexity lower by 6.38 %, 11.23 against 12.00.", True),
        (
            11.0,
            f"NOT lower: the fine-tuned mixture does not beat {EQUAL_COMPUTE}; perplexity 11.23 against 11.00, 2.13 % "
            "worse than the control's.",
            False,
        ),
        (
            11.2346,
            f"NOT lower by more than rounding: the fine-tuned mixture and {EQUAL_COMPUTE} agree to 4 digits; "
            "perplexity 11.23 against 11.23.",
            None,
        ),
    ],
)
def test_the_verdict_says_whether_the_mixture_won_with_equal_compute(facts, written, control, text, good):
    set_figure(facts, "dense, same FLOPs", control)
    expected = Verdict(f"{text} {SPENT.format('39.0 TFLOP')}.", good)
    assert list(judge(records(facts)))[3] == expected
    assert expected.text in "".join(Outline(written(facts)).text)


@pytest.mark.parametrize(
    ("control", "operations", "good"),
    [(12.0, 3.5e13, None), (12.0, 3.7e13, True), (11.0, 4.5e13, None), (11.0, 4.3e13, False)],
)
def test_more_than_a_tenth_more_compute_for_the_better_model_decides_nothing(facts, control, operations, good):
    set_figure(facts, "dense, same FLOPs", control)
    facts["finetune"]["flops"]["dense, same FLOPs"] = operations
    verdict = list(judge(records(facts)))[3]
    assert verdict.good is good
    ending = ": too unequal to count." if good is None else "."
    assert verdict.text.endswith(SPENT.format(f"{operations / 1e12:.1f} TFLOP") + ending)


@pytest.mark.parametrize(("control", "operations", "good"), [(12.0, 9e13, True), (11.0, 1e13, False)])
def test_who_wins_with_less_compute_has_won(facts, control, operations, good):
    set_figure(facts, "dense, same FLOPs", control)
    facts["finetune"]["flops"]["dense, same FLOPs"] = operations
    assert list(judge(records(facts)))[3].good is good


def test_the_verdict_says_what_the_experts_cost(facts):
    assert list(judge(records(facts)))[4] == Verdict(
        "What the experts cost: 1.51 × the dense model's parameters are active for a token (6.23 M against 4.13 M), "
        "it decodes 97.0 tokens/s "
        "against 208, and trained for 45.0 s against 30.0 s on the same tokens.",
        None,
    )


@pytest.mark.parametrize(
    ("tuned", "change"), [(12.5510, "2.00 % worse than"), (12.3049, "equal to"), (float("nan"), "not comparable with")]
)
def test_the_verdict_says_that_the_control_was_not_beaten(facts, written, tuned, change):
    set_figure(facts, "fine-tuned", tuned)
    line = verdict_lines(records(facts))[2]
    assert line.startswith("NOT lower: ")
    assert change in line
    assert line in "".join(Outline(written(facts)).text)


def test_a_win_by_less_than_the_digits_shown_is_no_win(facts):
    set_figure(facts, "fine-tuned", 12.3049 - 1e-5)
    line = verdict_lines(records(facts))[2]
    assert line.startswith("NOT lower by more than rounding: ")
    assert "12.30 against 12.30" in line


def test_the_verdict_compares_each_variant_with_float32_onnx(facts):
    lines = verdict_lines(records(facts))[-3:]
    assert (
        lines[0]
        == "ONNX float32: perplexity 11.23, less than 0.01 % worse than the fine-tuned torch model's; parity passed."
    )
    assert (
        lines[2]
        == f"ONNX int4: perplexity 11.51, {100 * (11.5123 / 11.2346 - 1):.2f} % worse than ONNX float32's; parity "
        "passed."
    )


def test_without_a_float32_variant_each_is_compared_with_torch(facts):
    del facts["variants"]["float32"]
    assert (
        verdict_lines(records(facts))[-2]
        == "ONNX int8: perplexity 11.24, 0.06 % worse than the fine-tuned torch model's; parity passed."
    )


def test_fine_tuning_that_helped_nothing_is_a_finding(facts):
    facts["finetune"]["best_steps"]["fine-tuned"] = 0
    finding = list(judge(records(facts)))[2]
    assert (finding.good, finding.text) == (
        False,
        "Fine-tuning did not help: no evaluation had a lower perplexity on the validation split than the start, so the "
        "start's weights were kept.",
    )


def test_where_a_higher_figure_is_better_the_higher_model_wins() -> None:
    """The F1s are 1 less a twentieth of the perplexities, so that the same models win."""
    facts = classified(make_facts())
    verdicts = list(judge(records(facts)))
    assert verdicts[2] == Verdict(
        "The fine-tuned mixture beats the dense model continued on the same tokens: F1 higher by 5.35 points, 0.4383 "
        "against 0.3848.",
        True,
    )
    assert verdicts[-1].text == "ONNX int4: F1 0.4244, 1.39 points worse than ONNX float32's; parity passed."
    set_figure(facts, "dense continued", 0.44)
    assert list(judge(records(facts)))[2] == Verdict(
        "NOT higher: the fine-tuned mixture does not beat the dense model continued on the same tokens; F1 0.4383 "
        "against 0.4400, 0.173 points worse than the control's.",
        False,
    )


@pytest.mark.parametrize(
    ("variant", "tiers", "meaning", "remedy"),
    [
        (
            "int4",
            ["language"],
            "it predicts text worse than the recipe allows",
            "take a variant with more bits than int4",
        ),
        ("float32", ["language"], "it predicts text worse than the recipe allows", "do not use this package"),
        ("int4", ["language", "weights"], "the file holds other weights", "do not use this package"),
        ("int4", ["files"], "its tokenizer or settings differ", "do not give this package away"),
    ],
)
def test_a_failure_says_what_it_means_and_what_to_do_now(
    variant: str, tiers: list[str], meaning: str, remedy: str
) -> None:
    facts = tiered(make_facts())
    parity = facts["variants"][variant]["parity"]
    for tier in tiers:
        parity["providers"]["CPUExecutionProvider"]["tiers"][tier] = "broken"
    breaches = [f"CPUExecutionProvider: {tier}: limit {n}" for tier in tiers for n in range(3)]
    parity.update(passed=False, breaches=breaches)
    line = next(line for line in verdict_lines(records(facts)) if line.startswith(f"ONNX {variant}: "))
    assert f"; parity FAILED: {meaning}" in line
    assert line.count("CPUExecutionProvider: ") == 2
    assert f"; {len(breaches) - 2} more). What now: {remedy}" in line


def test_a_difference_of_float32_s_rounding_is_called_so() -> None:
    facts = make_facts()
    figure = facts["variants"]["float32"]["parity"]["providers"]["CPUExecutionProvider"]["figures"][0]
    figure["value"] = 11.2345 * (1 + 1e-7)
    line = next(line for line in verdict_lines(records(facts)) if line.startswith("ONNX float32: "))
    assert line == (
        "ONNX float32: perplexity 11.23, equal but for rounding to the fine-tuned torch model's; parity passed."
    )
