"""The report: one self-contained page, and the same facts as JSON.

Everything here is computed from the facts that the stages returned; nothing is measured and no checkpoint is opened.
Sentences are chosen by the numbers, so a run that lost says so. The badge is parity's: did every exported variant agree
with torch within its limits? Whether fine-tuning paid is a finding, not a failure, and stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dense2moe.convert.report.costs import cost_grid
from dense2moe.convert.report.names import HTML_NAME, JSON_NAME
from dense2moe.convert.report.numerals import agree, format_count, format_perplexity, format_size
from dense2moe.convert.report.pictures import draw_pictures
from dense2moe.convert.report.summary import COLUMNS, Row, exported_model, find_measured, judge, row_cells, summarize
from dense2moe.convert.report.tables import (
    Grid,
    build_table,
    parity_sections,
    provenance_sections,
    receipt_table,
    tier_table,
    timing_table,
    trained_table,
)
from dense2moe.convert.report.templates import load_template
from dense2moe.upcycle.numbers import name_specials

_TEMPLATE_NAME = "report.html.j2"


def write_report(facts: dict[str, Any], output: Path) -> None:
    """Write `report.html` and `report.json` into the directory `output`.

    The page needs no other file and no network. The JSON is the facts, under "summary" the rows of `summarize` and
    under "verdicts" the findings of `judge`; its keys are sorted, and a number that JSON lacks is the string "NaN",
    "Infinity" or "-Infinity". `convert/report/facts.py` has its schema.

    Raises:
        OSError: the disk is full or not writable.
    """
    output.mkdir(parents=True, exist_ok=True)
    judged = {
        "summary": [asdict(row) for row in summarize(facts)],
        "verdicts": [asdict(verdict) for verdict in judge(facts)],
    }
    document = name_specials({**facts, **judged})
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (output / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (output / HTML_NAME).write_text(_page(facts), encoding="utf-8")


# --- The page


def _page(facts: dict[str, Any]) -> str:
    rows = summarize(facts)
    return load_template(_TEMPLATE_NAME).render(
        facts=facts,
        badge=_badge(rows),
        verdicts=list(judge(facts)),
        model=exported_model(facts),
        tiles=list(_tiles(facts)),
        summary=Grid(COLUMNS, tuple(row_cells(row) for row in rows)),
        first_onnx_row=next((n for n, row in enumerate(rows) if row.passed is not None), None),
        perplexity_note=_perplexity_note(facts),
        trained=trained_table(facts),
        pictures=draw_pictures(facts, rows),
        receipt=receipt_table(facts["upcycle"]["receipt"]),
        tiers=tier_table(facts),
        parity=list(parity_sections(facts)),
        builds=build_table(facts),
        timings=timing_table(facts),
        costs=cost_grid(facts.get("costs", {})),
        provenance=list(provenance_sections(facts)),
        json_name=JSON_NAME,
        subtitle=_subtitle(facts),
    )


def _badge(rows: Sequence[Row]) -> dict[str, str]:
    results = [row.passed for row in rows if row.passed is not None]
    if not results:
        return {"kind": "none", "word": "NO PARITY", "text": "No ONNX variant was exported."}
    counted = f"{sum(results)} of {len(results)} ONNX variants agree with torch within their limits."
    return (
        {"kind": "pass", "word": "PASS", "text": counted}
        if all(results)
        else {"kind": "fail", "word": "FAIL", "text": counted}
    )


def _subtitle(facts: dict[str, Any]) -> str:
    source, upcycle = facts["source"], facts["upcycle"]
    experts = f"{upcycle['num_experts']} experts a layer, top-{upcycle['num_experts_per_tok']}"
    return (
        f"{source['architecture']} of {format_count(source['num_parameters'])} parameters → {upcycle['target']}, "
        f"{experts}"
    )


def _tiles(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The few figures to remember: label, number, remark."""
    source, upcycle, evaluations = facts["source"], facts["upcycle"], facts["finetune"]["evaluations"]
    yield (
        "Parameters",
        f"{format_count(source['num_parameters'])} → {format_count(upcycle['num_parameters'])}",
        "dense → mixture",
    )
    active = upcycle["num_active_parameters"]
    yield "Active a token", format_count(active), f"{active / source['num_parameters']:.2f} × the dense model's"
    model = exported_model(facts)
    dense, tuned = (evaluations[name]["perplexity"] for name in ("dense", model))
    yield (
        "Perplexity",
        f"{format_perplexity(dense, 3)} → {format_perplexity(tuned, 3)}",
        f"dense → {model}, on held-out text",
    )
    if facts["variants"]:
        name, size = min(
            ((n, v["onnx"]["package_bytes"]) for n, v in facts["variants"].items()), key=lambda pair: pair[1]
        )
        yield (
            "Smallest ONNX",
            format_size(size),
            f"{name}; the {model} checkpoint has {format_size(evaluations[model]['weight_bytes'])}",
        )


def _perplexity_note(facts: dict[str, Any]) -> str:
    """A warning where parity measured perplexity on other text than the evaluations did."""
    measured = next((m for m in map(find_measured, facts["variants"].values()) if m), None)
    model = exported_model(facts)
    tuned = facts["finetune"]["evaluations"][model]["perplexity"]
    if measured is None or agree(tuned, measured["finetuned_perplexity"], 3):
        return ""
    there = format_perplexity(measured["finetuned_perplexity"])
    return (
        f"Parity measures perplexity on text of its own, where the {model} torch model has {there} (and "
        f"{format_perplexity(tuned)} above): "
        "compare ONNX rows with each other and with that figure."
    )
