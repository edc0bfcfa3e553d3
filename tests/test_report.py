"""Claims about the report: complete, self-contained, and honest when a run lost."""

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from report_facts import HOSTILE, make_facts, routing, searched, tiered
from rich.console import Console

from dense2moe.convert.report.pictures import Picture, plan_pictures
from dense2moe.convert.report.summary import Row, Verdict, judge, summarize, summary_table, verdict_lines
from dense2moe.convert.report.writer import write_report

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
STAGE_DASH = "1.2,1.2"


@pytest.fixture
def facts() -> dict[str, Any]:
    return make_facts()


class Outline(HTMLParser):
    """Collects start tags and complains about an element that is not closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> at {self.getpos()} closes something else"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def written(tmp_path):
    def write(facts: dict[str, Any]) -> str:
        write_report(facts, tmp_path)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is asked of the text, the tables or the JSON: drawing takes a hundred times as long as all else."""
    monkeypatch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the facts as they are, with its pictures."""
    output = tmp_path_factory.mktemp("report")
    write_report(make_facts(), output)
    return (output / "report.html").read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(page):
    tags = Outline(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "image", "iframe", "object", "use:href"}
    targets = [
        value
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href", "srcset", "action")
    ]
    assert targets
    assert all(value.startswith("#") for value in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_every_id_is_unique_and_every_reference_is_met(page):
    tags = Outline(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    references = {attributes["href"][1:] for _, attributes in tags if "href" in attributes} | set(
        re.findall(r"url\(#(.*?)\)", page)
    )
    assert len(ids) == len(set(ids))
    assert references <= set(ids)


def test_the_page_is_balanced_html_with_ten_described_pictures(page):
    tags = Outline(page).tags
    assert sum(tag == "svg" for tag, _ in tags) == sum(tag == "figcaption" for tag, _ in tags) == 10
    assert all(attributes["aria-label"] for _, attributes in tags if attributes.get("role") == "img")


def test_the_page_holds_the_perplexity_of_every_model_and_variant(page):
    text = " ".join(Outline(page).text)
    for perplexity in ("14.88", "12.30", "11.23", "11.24", "11.51"):
        assert perplexity in text


def test_text_from_the_recipe_is_escaped(facts, written):
    facts["finetune"]["warnings"] = ["<b>layer</b> & co"]
    facts["source"]["origin"] = "<img src=x>"
    page = written(facts)
    assert "<script" not in page
    assert "<b>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(" in page
    assert HOSTILE in "".join(Outline(page).text)


def test_the_same_facts_write_the_same_page(facts, written, page):
    assert written(facts) == page


def test_writing_leaves_the_facts_and_matplotlib_as_they_were(facts, written):
    import matplotlib

    before, settings = copy.deepcopy(facts), dict(matplotlib.rcParams)
    written(facts)
    assert facts == before
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.usefixtures("no_pictures")
def test_the_json_is_the_facts_the_summary_and_the_verdicts(facts, tmp_path):
    write_report(facts, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    summary, verdicts = found.pop("summary"), found.pop("verdicts")
    assert found == facts
    assert [Verdict(**verdict) for verdict in verdicts] == list(judge(facts))
    assert [Row(**row) for row in summary] == summarize(facts)


@pytest.mark.usefixtures("no_pictures")
def test_the_json_is_sorted_and_has_no_nan(facts, tmp_path):
    facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] = float("nan")
    facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["perplexity"] = float("inf")
    write_report(facts, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert list(found) == sorted(found)
    assert found["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] == "NaN"
    assert found["summary"][-1]["perplexity"] == "Infinity"


def test_rows_come_in_the_order_in_which_the_models_came_to_be(facts):
    names = [row.name for row in summarize(facts)]
    assert names == [
        "dense",
        "upcycled",
        "dense continued",
        "dense, equal time",
        "fine-tuned",
        "ONNX float32",
        "ONNX int8",
        "ONNX int4",
    ]


def test_a_variant_row_takes_its_worst_layer_and_its_agreement_with_the_fine_tuned_model(facts):
    assert summarize(facts)[-1] == Row("ONNX int4", 11.5123, 7_810_000, 0.9512, 0.9689, 655.0, 13100.0, True)
    assert summarize(facts)[0] == Row("dense", 14.8797, 8_262_144, None, None, 210.0, None, None)


def test_the_terminal_table_fits_in_100_columns(facts):
    facts["variants"]["int4"]["parity"]["passed"] = False
    facts["variants"]["float16"] = facts["variants"]["int8"]
    facts["finetune"]["evaluations"]["dense"].update(
        perplexity=123456.7, weight_bytes=698_000_000_000, decode_tokens_per_second=123456.7
    )
    stream = io.StringIO()
    Console(file=stream, width=100).print(summary_table(facts))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert sum(line.startswith(tuple(f"{row.name}  " for row in summarize(facts))) for line in lines) == len(
        summarize(facts)
    )
    assert "FAILED" in stream.getvalue()
    assert "698 GB" in stream.getvalue()
    assert "123,457" in stream.getvalue()


def test_the_verdict_says_that_upcycling_kept_the_perplexity(facts):
    assert (
        verdict_lines(facts)[0]
        == "Upcycling kept the perplexity to 4 digits: 14.880 dense, 14.880 upcycled, before any training."
    )


def test_the_verdict_says_that_upcycling_changed_the_perplexity(facts):
    facts["finetune"]["evaluations"]["upcycled"]["perplexity"] = 14.8903
    assert (
        verdict_lines(facts)[0]
        == "Upcycling did NOT keep the perplexity to 4 digits: 14.880 dense, 14.890 upcycled, before any training."
    )


def test_the_verdict_says_by_how_much_the_control_was_beaten(facts):
    line = verdict_lines(facts)[1]
    assert f"lower by {100 * (12.3049 - 11.2345) / 12.3049:.2f} %" in line
    assert "11.23 against 12.30" in line
    assert "NOT" not in line


EQUAL_TIME = "the dense model trained for as long"
TIMES = "The control had {}, the mixture 45.0 s (80 steps)"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("control", "text", "good"),
    [
        (12.0, f"The fine-tuned mixture beats {EQUAL_TIME}: perplexity lower by 6.38 %, 11.23 against 12.00.", True),
        (
            11.0,
            f"NOT lower: the fine-tuned mixture does not beat {EQUAL_TIME}; perplexity 11.23 against 11.00, 2.13 % "
            "above the control's.",
            False,
        ),
        (
            11.2346,
            f"NOT lower by more than rounding: the fine-tuned mixture and {EQUAL_TIME} agree to 4 digits; perplexity "
            "11.23 against 11.23.",
            None,
        ),
    ],
)
def test_the_verdict_says_whether_the_mixture_won_at_equal_time(facts, written, control, text, good):
    facts["finetune"]["evaluations"]["dense, equal time"]["perplexity"] = control
    expected = Verdict(f"{text} {TIMES.format('44.0 s (120 steps)')}.", good)
    assert list(judge(facts))[2] == expected
    assert expected.text in "".join(Outline(written(facts)).text)


@pytest.mark.parametrize(
    ("control", "seconds", "good"), [(12.0, 40.0, None), (12.0, 41.0, True), (11.0, 50.0, None), (11.0, 49.0, False)]
)
def test_more_than_a_tenth_more_time_for_the_better_model_decides_nothing(facts, control, seconds, good):
    facts["finetune"]["evaluations"]["dense, equal time"]["perplexity"] = control
    facts["finetune"]["seconds"]["dense, equal time"] = seconds
    verdict = list(judge(facts))[2]
    assert verdict.good is good
    ending = ": too unequal to count." if good is None else "."
    assert verdict.text.endswith(TIMES.format(f"{seconds} s (120 steps)") + ending)


@pytest.mark.parametrize(("control", "seconds", "good"), [(12.0, 90.0, True), (11.0, 20.0, False)])
def test_who_wins_with_less_time_has_won(facts, control, seconds, good):
    facts["finetune"]["evaluations"]["dense, equal time"]["perplexity"] = control
    facts["finetune"]["seconds"]["dense, equal time"] = seconds
    assert list(judge(facts))[2].good is good


def test_the_verdict_says_what_the_experts_cost(facts):
    assert list(judge(facts))[3] == Verdict(
        "What the experts cost: 1.51 × the dense model's parameters are active for a token (6.23 M against 4.13 M), "
        "it decodes 97.0 tokens/s "
        "against 208, and trained for 45.0 s against 30.0 s on the same tokens.",
        None,
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_page_tells_what_each_trained_model_reached_and_took(facts, written):
    facts["finetune"]["seconds"]["dense, equal time"] = 141.0
    text = " ".join(" ".join(Outline(written(facts)).text).split())
    for row in (
        "fine-tuned 2.4190 11.23 6.23 M 97.0 45.0 s 80",
        "dense continued 2.5100 12.30 4.13 M 208 30.0 s 80",
        "dense, equal time 2.4849 12.00 4.13 M 209 2.35 min 120",
    ):
        assert row in text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("tuned", "change"), [(12.5510, "2.00 % above"), (12.3049, "equal to"), (float("nan"), "not comparable with")]
)
def test_the_verdict_says_that_the_control_was_not_beaten(facts, written, tuned, change):
    facts["finetune"]["evaluations"]["fine-tuned"]["perplexity"] = tuned
    line = verdict_lines(facts)[1]
    assert line.startswith("NOT lower: ")
    assert change in line
    assert line in "".join(Outline(written(facts)).text)


def test_a_win_by_less_than_the_digits_shown_is_no_win(facts):
    facts["finetune"]["evaluations"]["fine-tuned"]["perplexity"] = 12.3049 - 1e-5
    line = verdict_lines(facts)[1]
    assert line.startswith("NOT lower by more than rounding: ")
    assert "12.30 against 12.30" in line


def test_the_verdict_compares_each_variant_with_float32_onnx(facts):
    lines = verdict_lines(facts)[-3:]
    assert (
        lines[0]
        == "ONNX float32: perplexity 11.23, less than 0.01 % above the fine-tuned torch model's; parity passed."
    )
    assert (
        lines[2]
        == f"ONNX int4: perplexity 11.51, {100 * (11.5123 / 11.2346 - 1):.2f} % above float32 ONNX's; parity passed."
    )


def test_without_a_float32_variant_each_is_compared_with_torch(facts):
    del facts["variants"]["float32"]
    assert (
        verdict_lines(facts)[-2]
        == "ONNX int8: perplexity 11.24, 0.06 % above the fine-tuned torch model's; parity passed."
    )


def test_a_run_that_agrees_passes(page):
    assert '<span class="badge pass">PASS</span>' in page
    assert ">FAIL<" not in page
    assert "3 of 3 ONNX variants agree" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_parity_shows_its_breach_and_a_fail_badge(facts, written):
    breach = "CPUExecutionProvider: top-1 agreement is 0.91; it must be at least 0.95"
    facts["variants"]["int4"]["parity"].update(passed=False, breaches=[breach])
    page = written(facts)
    assert '<span class="badge fail">FAIL</span>' in page
    assert "2 of 3 ONNX variants agree" in page
    assert verdict_lines(facts)[-1].endswith(f"parity FAILED: {breach}.")
    assert "".join(Outline(page).text).count(breach) == 2  # in the verdict and at the variant


def forget(facts: dict[str, Any], *models: str) -> None:
    """The facts of a run that did not train these models."""
    finetune = facts["finetune"]
    for key in ("evaluations", "best_steps", "num_steps", "seconds"):
        for model in models:
            del finetune[key][model]
    finetune["history"] = [step for step in finetune["history"] if step["model"] not in models]


def test_a_control_that_was_not_trained_is_missing_and_said_to_be(facts, written):
    forget(facts, "dense continued", "dense, equal time")
    text = "".join(Outline(written(facts)).text)
    assert "without a dense control" in text
    assert "nothing to compare it with" in text
    assert "dense continued" not in text
    assert "equal time" not in text
    assert "What the experts cost" not in text
    assert [row.name for row in summarize(facts)][:3] == ["dense", "upcycled", "fine-tuned"]


@pytest.mark.parametrize("tiers", [False, True])
def test_a_run_without_fine_tuning_speaks_of_the_upcycled_model_alone(tiers, facts, written):
    facts = tiered(facts) if tiers else facts
    forget(facts, "fine-tuned", "dense continued", "dense, equal time")
    facts["finetune"] |= {"precision": None, "router_task_gradient": None, "warnings": []}
    page = written(facts)
    text = "".join(Outline(page).text)
    for word in ("fine-tuned", "dense continued", "equal time", "What the experts bought", "dense control"):
        assert word not in text, word
    assert "fine-tuned" not in page  # nor in the words for those who see no picture
    assert [row.name for row in summarize(facts)][:3] == ["dense", "upcycled", "ONNX float32"]
    assert verdict_lines(facts)[1] == (
        "Fine-tuning was switched off: the ONNX variants are those of the upcycled model, which is also what they "
        "are compared with."
    )
    assert "0.06 % above the upcycled torch model's" not in text  # int8 is compared with float32 ONNX
    assert "dense → upcycled, on held-out text" in text
    assert "as fast as the upcycled model in torch" in text
    assert "Training" not in titles(facts)


def test_fine_tuning_that_helped_nothing_is_a_finding(facts):
    facts["finetune"]["best_steps"]["fine-tuned"] = 0
    finding = list(judge(facts))[1]
    assert (finding.good, finding.text) == (
        False,
        "Fine-tuning helped nothing: no look at the validation split was better than the start, whose weights were "
        "kept.",
    )


def test_a_run_without_the_control_of_equal_time_has_that_of_equal_tokens(facts, written):
    forget(facts, "dense, equal time")
    text = "".join(Outline(written(facts)).text)
    assert "trained for as long" not in text
    assert verdict_lines(facts)[2].startswith("What the experts cost")
    assert "reached 2.430 for the mixture and 2.520 for the dense model at equal tokens;" in text


def picture(facts: dict[str, Any], title: str) -> Picture:
    return plan_pictures(facts, summarize(facts))[title]()


def titles(facts: dict[str, Any]) -> set[str]:
    return set(plan_pictures(facts, summarize(facts)))


def test_the_training_curve_shows_the_mixture_and_both_controls(facts):
    drawn = picture(facts, "Training")
    assert (
        "reached 2.430 for the mixture, 2.520 for the dense model at equal tokens and 2.490 for the dense model at "
        "equal time;" in drawn.caption
    )
    for label in ("mixture", "dense, equal tokens", "dense, equal time"):
        assert f">{label}<" in drawn.svg


def test_the_training_curve_marks_where_stages_begin(facts):
    ends = {
        (s["model"], s["num_tokens"]) for s in facts["finetune"]["history"] if s["step"] in (40, 60) and s["stage"] == 0
    }
    places = {tokens for _, tokens in ends}
    assert len(places) == 2  # the mixture's and its equal in tokens, and that of equal time
    drawn = picture(facts, "Training")
    assert drawn.svg.count(f"stroke-dasharray: {STAGE_DASH}") == len(places)
    assert "where a stage begins" in drawn.caption


def test_one_stage_is_not_marked(facts):
    for step in facts["finetune"]["history"]:
        step["stage"] = 0
    for title in ("Training", "Load over training", "Experts coming apart", "Routers over training"):
        drawn = picture(facts, title)
        assert STAGE_DASH not in drawn.svg
        assert "stage" not in drawn.caption


def test_the_specialization_names_the_expert_that_tells_domains_apart_most(facts):
    drawn = picture(facts, "Specialization")
    assert drawn.caption == (
        "From one domain to another 11 % of a layer's load moves to other experts, from one half of a domain to the "
        "other 2.00 %, so the experts "
        "know the domains; the greatest difference is expert 1 of layer 2, with 1.60 times its fair share of prose "
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


def test_a_run_without_variants_claims_no_parity(facts, written):
    facts["variants"] = {}
    page = written(facts)
    assert "NO PARITY" in page
    assert ">PASS<" not in page
    assert "nothing was exported" in verdict_lines(facts)[-1]


def test_a_provider_that_did_not_run_says_why(page):
    assert "not run: no CUDA device" in page


def test_a_variant_measured_nowhere_has_a_row_without_figures(facts, written):
    facts["variants"]["int4"]["parity"] = {
        "providers": {"CPUExecutionProvider": "not run: onnxruntime is too old"},
        "passed": False,
        "breaches": [],
    }
    assert summarize(facts)[-1] == Row("ONNX int4", None, 7_810_000, None, None, None, None, False)
    assert "too old" in written(facts)


def test_figures_that_are_no_numbers_still_make_a_page(facts, written):
    figures = facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]
    figures["finetuned"].update(max_error=float("inf"), kl=float("nan"), hidden_error=[float("nan")] * 4)
    figures["perplexity"] = float("nan")
    facts["variants"]["int4"]["parity"].update(passed=False, breaches=["the logits are not finite"])
    text = "".join(Outline(written(facts)).text)
    assert "∞" in text
    assert "NaN" in text


@pytest.mark.usefixtures("no_pictures")
def test_perplexity_on_other_text_is_pointed_out(facts, written):
    assert "text of its own" not in written(facts)
    for variant in facts["variants"].values():
        variant["parity"]["providers"]["CPUExecutionProvider"]["finetuned_perplexity"] = 10.9
    assert "text of its own" in written(facts)


@pytest.mark.usefixtures("no_pictures")
def test_unknown_facts_are_shown_in_the_provenance(facts, written):
    facts["source"]["licence"] = "Apache-2.0"
    facts["data"]["interpreter"] = {"implementation": "CPython", "modules": list(range(100))}
    text = "".join(Outline(written(facts)).text)
    assert "licence" in text
    assert "Apache-2.0" in text
    assert "interpreter.implementation" in text
    assert "100 entries, in report.json" in text


def test_one_step_of_one_layer_makes_a_page(facts, written):
    facts["finetune"]["history"] = facts["finetune"]["history"][:2]
    facts["finetune"]["history"][0]["layers"] = [{"number": 0, **routing([1.0], 0.0, 0.0, 1.0)}]
    for variant in facts["variants"].values():
        variant["parity"]["providers"]["CPUExecutionProvider"]["finetuned"].update(
            routing_agreement=[1.0], hidden_error=[0.0]
        )
    assert "got 1.00 times its fair share" in written(facts)


def test_a_run_without_history_makes_a_page(facts, written):
    facts["finetune"]["history"] = []
    Outline(written(facts))


def test_a_large_model_makes_a_page(facts, written):
    load = [1 / 64] * 64
    for step in facts["finetune"]["history"]:
        step["layers"] = [{"number": n, **routing(load, 4.1, 0.2, 0.9)} for n in range(48)] if step["layers"] else []
    facts["finetune"]["domains"] = {
        "loads": dict.fromkeys("abcdefgh", [load] * 48),
        "between": [0.0] * 48,
        "within": [0.0] * 48,
    }
    facts["finetune"]["sparse_layers"] = list(range(48))
    Outline(written(facts))


def test_nothing_is_wider_than_a_phone(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    widths = re.findall(r"(?<![-\w])(?:min-)?width:\s*([^;}]+)", style)
    assert widths
    assert set(widths) == {"100%"}
    assert "overflow-x: auto" in style
    assert 'content="width=device-width' in page
    assert all("width" not in attributes for tag, attributes in Outline(page).tags if tag == "svg")


def test_light_dark_and_paper_each_have_their_colours(page):
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_timed_lowerings_are_a_table(page) -> None:
    section = page[page.index("Which way of writing the experts is fastest here") :]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", section[: section.index("</table>")])
    assert cells[:15] == [
        "Variant",
        "Experts written as",
        "Prefill tokens/s",
        "Decode tokens/s",
        "Request, ms",
        "float32",
        "grouped",
        "1,234",
        "432",
        "355.5",
        "float32",
        "qmoe",
        "1,000",
        "400",
        "416.0",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_a_named_lowering_leaves_no_empty_table(facts: dict[str, Any], tmp_path) -> None:
    for found in facts["variants"].values():
        found["onnx"]["timings"] = []
    write_report(facts, tmp_path)
    assert "Which way of writing" not in (tmp_path / "report.html").read_text(encoding="utf-8")


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
        f"7.00 MB, its perplexity {100 * (11.5 / 11.24 - 1):.2f} % above the reference's (dashed); the limit: +3 %."
        in drawn.caption
    )
    assert ">4 bits, attention 8<" in drawn.svg
    for point in facts["variants"]["int4"]["quantize"]["search"]["points"]:
        point["chosen"] = False
    assert "none met the limit: +3 %" in picture(facts, "Search of bits, int4").caption


@pytest.mark.usefixtures("no_pictures")
def test_the_tiers_are_a_table_and_parity_tells_what_it_found(facts, written) -> None:
    variants = tiered(facts)["variants"]
    variants["int4"]["parity"]["providers"]["CPUExecutionProvider"]["tiers"]["routing"] = "broken"
    text = " ".join(" ".join(Outline(written(facts)).text).split())
    assert (
        "tier question float32 int8 int4 weights Is every row of every matrix in the file the torch twin's? passed "
        "passed passed operator" in text
    )
    assert "Does every token visit the same experts? passed passed FAILED" in text
    assert "32 times what float32 differs from float64 on this text" in text
    assert (
        "wrote 8 texts of 64 tokens, as the torch twin did for 53.0 tokens in the mean and 24 in the shortest; 2 "
        "parted from it" in text
    )
    assert "wrote 8 texts of 64 tokens, each token as the torch twin did." in text
    assert "The file's weights were read row by row: all 12,345 rows and 9 vectors are the twin's." in text
    assert (
        "Each of 9 places inside the graph was compared on the graph's own input: nearest to its limit is the "
        "experts of layer 3, with an" in text
    )
    assert (
        "with an error of 8.0e-7, at most 3.2e-6. 8 flips of an 8-bit rounding inside an operator were told apart."
        in text
    )
    assert (
        "place worst layer relative error limit noise of float32 tokens flips router 3 4.0e-7 3.2e-6 1.0e-7 112 0 "
        "experts 3 8.0e-7" in text
    )
    assert "Every token went to the experts that the fine-tuned model chooses" in text
    assert "No node was placed on another provider." in text
    assert "top-5 agreement" in text


def test_the_digests_of_the_packages_are_in_the_provenance(page) -> None:
    text = "".join(Outline(page).text)
    assert "onnx-int8.model.onnx" in text
    assert "a7" * 32 in text
