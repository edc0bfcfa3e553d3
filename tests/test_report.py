"""Claims about the report: complete, self-contained, and honest when a run lost."""

import copy
import io
import json
import re
from dataclasses import asdict
from typing import Any

import pytest
from outline import Outline
from report_facts import HOSTILE, classified, cpu, forget, make_facts, records, routing, searched, set_figure, tiered
from rich.console import Console

from dense2moe.convert.report.pictures.selection import plan_pictures
from dense2moe.convert.report.summary import Row, Verdict, summarize, summary_table
from dense2moe.convert.report.verdicts import judge, verdict_lines
from dense2moe.convert.report.writer import write_report
from dense2moe.upcycle.tasks.figure import Figure


@pytest.fixture
def facts() -> dict[str, Any]:
    return make_facts()


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


def perplexity(value: float) -> Figure:
    return Figure("perplexity", value, "", "lower")


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
    assert [Verdict(**verdict) for verdict in verdicts] == list(judge(records(facts)))
    assert summary == [asdict(row) for row in summarize(records(facts))]


@pytest.mark.usefixtures("no_pictures")
def test_the_json_is_sorted_and_has_no_nan(facts, tmp_path):
    facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] = float("nan")
    cpu(facts, "int4")["figures"][0]["value"] = float("inf")
    write_report(facts, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert list(found) == sorted(found)
    assert found["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] == "NaN"
    assert found["summary"][-1]["figure"]["value"] == "Infinity"


def test_rows_come_in_the_order_in_which_the_models_came_to_be(facts):
    names = [row.name for row in summarize(records(facts))]
    assert names == [
        "dense",
        "upcycled",
        "dense continued",
        "dense, same FLOPs",
        "fine-tuned",
        "ONNX float32",
        "ONNX int8",
        "ONNX int4",
    ]


def test_a_variant_row_takes_its_worst_layer_and_its_agreement_with_the_fine_tuned_model(facts):
    found = summarize(records(facts))
    assert found[-1] == Row("ONNX int4", perplexity(11.5123), 7_810_000, 0.9512, 0.9689, 655.0, 13100.0, True)
    assert found[0] == Row("dense", perplexity(14.8797), 8_262_144, None, None, 210.0, None, None)


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table_fits_and_cuts_nothing(facts, width):
    facts["variants"]["int4"]["parity"]["passed"] = False
    facts["variants"]["float16"] = facts["variants"]["int8"]
    facts["finetune"]["evaluations"]["dense"].update(weight_bytes=698_000_000_000, decode_tokens_per_second=123456.7)
    set_figure(facts, "dense", 123456.7)
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary_table(records(facts), width))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert sum(line.startswith(tuple(f"{row.name} " for row in summarize(records(facts)))) for line in lines) == len(
        summarize(records(facts))
    )
    assert "FAILED" in stream.getvalue()
    assert "698 GB" in stream.getvalue()
    assert "123,457" in stream.getvalue()


@pytest.mark.usefixtures("no_pictures")
def test_the_page_tells_what_each_trained_model_reached_and_took(facts, written):
    facts["finetune"]["seconds"]["dense, same FLOPs"] = 141.0
    text = " ".join(" ".join(Outline(written(facts)).text).split())
    for row in (
        "fine-tuned 2.4190 11.23 6.23 M 97.0 40.0 TFLOP 45.0 s 80",
        "dense continued 2.5100 12.30 4.13 M 208 26.0 TFLOP 30.0 s 80",
        "dense, same FLOPs 2.4849 12.00 4.13 M 209 39.0 TFLOP 2.35 min 120",
    ):
        assert row in text


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
    assert f"; parity FAILED: {breach}. What now: " in verdict_lines(records(facts))[-1]
    assert "".join(Outline(page).text).count(breach) == 2  # in the verdict and at the variant


def test_a_control_that_was_not_trained_is_missing_and_said_to_be(facts, written):
    forget(facts, "dense continued", "dense, same FLOPs")
    text = "".join(Outline(written(facts)).text)
    assert "without a dense control" in text
    assert "nothing to compare it with" in text
    assert "dense continued" not in text
    assert "same FLOPs" not in text
    assert "What the experts cost" not in text
    assert [row.name for row in summarize(records(facts))][:3] == ["dense", "upcycled", "fine-tuned"]


@pytest.mark.parametrize("tiers", [False, True])
def test_a_run_without_fine_tuning_speaks_of_the_upcycled_model_alone(tiers, facts, written):
    facts = tiered(facts) if tiers else facts
    forget(facts, "fine-tuned", "dense continued", "dense, same FLOPs")
    facts["finetune"] |= {"precision": None, "router_task_gradient": None, "warnings": []}
    page = written(facts)
    text = "".join(Outline(page).text)
    for word in ("fine-tuned", "dense continued", "same FLOPs", "What the experts bought", "dense control"):
        assert word not in text, word
    assert "fine-tuned" not in page  # nor in the words for those who see no picture
    assert [row.name for row in summarize(records(facts))][:3] == ["dense", "upcycled", "ONNX float32"]
    assert verdict_lines(records(facts))[1] == (
        "Fine-tuning was switched off: the ONNX variants are made from the upcycled model, and compared with it."
    )
    assert "0.06 % worse than the upcycled torch model's" not in text  # int8 is compared with float32 ONNX
    assert "dense → upcycled, on held-out text" in text
    assert "as fast as the upcycled model in torch" in text
    assert "Training" not in plan_pictures(records(facts), [])


def test_a_run_without_the_control_of_equal_compute_has_that_of_equal_tokens(facts, written):
    forget(facts, "dense, same FLOPs")
    text = "".join(Outline(written(facts)).text)
    assert "same compute" not in text
    assert verdict_lines(records(facts))[3].startswith("What the experts cost")
    assert "reached 2.430 for the mixture and 2.520 for the dense model with the same tokens;" in text


def test_a_run_without_variants_claims_no_parity(facts, written):
    facts["variants"] = {}
    page = written(facts)
    assert "NO PARITY" in page
    assert ">PASS<" not in page
    assert "nothing was exported" in verdict_lines(records(facts))[-1]


def test_a_provider_that_did_not_run_says_why(page):
    assert "not run: no CUDA device" in page


def test_a_variant_measured_nowhere_has_a_row_without_figures(facts, written):
    facts["variants"]["int4"]["parity"] = {
        "providers": {"CPUExecutionProvider": "not run: onnxruntime is too old"},
        "passed": False,
        "breaches": [],
    }
    assert summarize(records(facts))[-1] == Row("ONNX int4", None, 7_810_000, None, None, None, None, False)
    assert "too old" in written(facts)


def test_figures_that_are_no_numbers_still_make_a_page(facts, written):
    figures = facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]
    figures["finetuned"].update(max_error=float("inf"), kl=float("nan"), hidden_error=[float("nan")] * 4)
    figures["figures"][0]["value"] = float("nan")
    facts["variants"]["int4"]["parity"].update(passed=False, breaches=["the logits are not finite"])
    text = "".join(Outline(written(facts)).text)
    assert "∞" in text
    assert "NaN" in text


@pytest.mark.usefixtures("no_pictures")
def test_perplexity_on_other_text_is_pointed_out(facts, written):
    assert "text of its own" not in written(facts)
    for variant in facts["variants"].values():
        variant["parity"]["providers"]["CPUExecutionProvider"]["finetuned_figures"][0]["value"] = 10.9
    assert "text of its own" in written(facts)


@pytest.mark.usefixtures("no_pictures")
def test_whatever_the_source_of_the_text_tells_is_in_the_provenance(facts, written):
    facts["data"]["interpreter"] = {"implementation": "CPython", "modules": list(range(100))}
    text = "".join(Outline(written(facts)).text)
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
        "information": [0.0] * 48,
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


@pytest.mark.usefixtures("no_pictures")
def test_the_tiers_are_a_table_and_parity_tells_what_it_found(facts, written) -> None:
    variants = tiered(facts)["variants"]
    variants["int4"]["parity"]["providers"]["CPUExecutionProvider"]["tiers"]["routing"] = "broken"
    text = " ".join(" ".join(Outline(written(facts)).text).split())
    assert (
        "tier float32 int8 int4 question weights passed passed passed Does the file hold the twin's weights, row by "
        "row? operator" in text
    )
    assert "routing passed passed FAILED Does every token visit the same experts?" in text
    assert "32 times what float32 differs from float64 on this text" in text
    assert (
        "wrote 8 texts of 64 tokens, as the torch twin did for 53.0 tokens on average and 24 at least; 2 "
        "diverged" in text
    )
    assert "wrote 8 texts of 64 tokens, each token as the torch twin did." in text
    assert "The file's weights were read row by row: all 12,345 rows and 9 vectors are the twin's." in text
    assert (
        "Each of 9 places inside the graph was compared with the twin's, given the same input: nearest to its limit of "
        "3.2e-6 is the experts of layer 3, with an error of 8.0e-7. In 8 tokens an 8-bit rounding inside an operator "
        "went the other way, which is no fault." in text
    )
    assert (
        "place worst layer relative error limit noise of float32 tokens flips router 3 4.0e-7 3.2e-6 1.0e-7 112 0 "
        "experts 3 8.0e-7" in text
    )
    assert "Every token went to the experts that the fine-tuned model chooses" in text
    assert "Every operator of the graph ran on the provider asked for." in text
    assert "top-5 agreement" in text


def test_the_digests_of_the_packages_are_in_the_provenance(page) -> None:
    text = "".join(Outline(page).text)
    assert "onnx-int8.model.onnx" in text
    assert "a7" * 32 in text


def tiles(page: str) -> dict[str, tuple[str, str, str]]:
    """By its label each tile's figure, its remark, and the class of that."""
    found = re.findall(r'<div><dt>(.*?)</dt><dd class="figure">(.*?)</dd><dd class="(.*?)">(.*?)</dd></div>', page)
    return {label: (figure, remark, kind) for label, figure, kind, remark in found}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("dense", "tuned", "figure", "words", "kind"),
    [
        (20.9012, 20.9034, "20.901 → 20.903", "worse by 0.01 %", "remark mark bad"),
        (20.9034, 20.9012, "20.903 → 20.901", "better by 0.01 %", "remark mark good"),
        (14.8797, 11.2345, "14.9 → 11.2", "better by 24 %", "remark mark good"),
        (20.9, 20.9 * (1 + 1e-7), "20.90 → 20.90", "the same but for rounding", "remark"),
        (20.9, float("nan"), "20.90 → NaN", "not comparable", "remark mark bad"),
    ],
)
def test_a_tile_says_in_digits_and_in_words_whether_the_model_got_worse(
    facts, written, dense, tuned, figure, words, kind
) -> None:
    set_figure(facts, "dense", dense)
    set_figure(facts, "fine-tuned", tuned)
    assert tiles(written(facts))["Perplexity (lower is better)"] == (
        figure,
        f"{words}: dense → fine-tuned, on held-out text",
        kind,
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_smallest_model_of_the_tiles_has_passed(facts, written) -> None:
    label = "Smallest ONNX model that passed"
    assert tiles(written(facts))[label][:2] == ("7.81 MB", "int4; the fine-tuned checkpoint has 41.7 MB")
    facts["variants"]["int4"]["parity"]["passed"] = False
    assert tiles(written(facts))[label][:2] == ("12.3 MB", "int8; the fine-tuned checkpoint has 41.7 MB")
    for variant in facts["variants"].values():
        variant["parity"]["passed"] = False
    assert tiles(written(facts))[label] == (
        "—",
        "no ONNX model agrees with torch within its limits",
        "remark mark bad",
    )


def test_where_a_higher_figure_is_better_the_page_says_so(facts, written) -> None:
    """A classifier's F1; the word for another task's figure stands nowhere."""
    page = written(classified(searched(facts)))
    assert tiles(page)["F1 (higher is better)"] == (
        "0.256 → 0.438",
        "better by 18.2 points: dense → fine-tuned, on held-out text",
        "remark mark good",
    )
    text = " ".join(" ".join(Outline(page).text).split())
    assert "perplexity" not in page.lower()
    assert "Model Parity F1 Size" in text
    assert "Up and to the left is better: ONNX int4 is 5.4 times smaller than ONNX float32" in text


def receipt_of(num_layers: int) -> list[dict[str, Any]]:
    """A receipt layer by layer, in two dtypes; one of its errors is near its limit."""
    return [
        {
            "router": router,
            "dtype": dtype,
            "text": f"layer {layer}, padded batch",
            "experts": experts,
            "num_tokens": 320,
            "rel": 9e-6 if (layer, router, dtype, experts) == (17, "shipped", "float32", "eager") else 1e-7,
            "bitwise": router == "zero",
            "bitwise_due": router == "zero",
            "limit": 1e-5 if dtype == "float32" else None,
        }
        for layer in range(num_layers)
        for router in ("shipped", "zero")
        for experts in ("eager", "grouped_mm")
        for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.usefixtures("no_pictures")
def test_a_receipt_of_many_layers_has_a_row_a_kind_the_worst_first_and_the_rest_folded(facts, written) -> None:
    facts["upcycle"]["receipt"] = receipt_of(30)
    page = written(facts)
    shown, folded = page[page.index("<h2>Receipt") :].split("<details>")
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)]
    assert rows[1] == [
        "layer …, padded batch; shipped router, eager experts",
        "9.0e-6",
        "1.0e-7",
        "320",
        "60",
        "layer 17, padded batch",
    ]
    assert len(rows) == 1 + 4
    assert "<summary>All 240 comparisons</summary>" in folded
    assert folded[: folded.index("</details>")].count("<tr>") == 1 + 120


def test_a_receipt_of_few_rows_is_shown_whole(page) -> None:
    assert "<details>" not in page
