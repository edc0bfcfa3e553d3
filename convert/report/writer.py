"""The report: one self-contained page, and the same facts as JSON.

Everything here is computed from the facts that the stages returned; nothing is measured and no checkpoint is opened.
Sentences are chosen by the numbers, so a run that lost says so. The badge is parity's: did every exported variant agree
with torch within its limits? Whether fine-tuning paid is a finding, not a failure, and stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dense2moe.convert.report.costs import cost_grid
from dense2moe.convert.report.facts import ReportFacts, read_facts
from dense2moe.convert.report.figures import describe_step, figure_title, figures_agree, format_figure
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.label_tables import confusion_table, figure_table, label_table
from dense2moe.convert.report.merging_tables import distance_table, soup_table
from dense2moe.convert.report.names import HTML_NAME, JSON_NAME
from dense2moe.convert.report.numerals import NONE, format_count, format_size
from dense2moe.convert.report.parity_tables import parity_sections, tier_table
from dense2moe.convert.report.pictures.selection import draw_pictures
from dense2moe.convert.report.routers import describe_routers
from dense2moe.convert.report.summary import Row, describe_models, row_cells, summarize, summary_columns
from dense2moe.convert.report.tables import (
    build_table,
    provenance_sections,
    receipt_tables,
    timing_table,
    trained_table,
)
from dense2moe.convert.report.templates import load_template
from dense2moe.convert.report.verdicts import judge
from dense2moe.convert.report.worth import branch_table, domain_table, oracle_table
from dense2moe.upcycle.numbers import name_specials

_TEMPLATE_NAME = "report.html.j2"


def write_report(found: Mapping[str, Any], output: Path) -> None:
    """Write `report.html` and `report.json` into the directory `output`.

    The page needs no other file and no network. The JSON is the facts that were found, under "summary" the rows of
    `summarize` and under "verdicts" the findings of `judge`; its keys are sorted, and a number that JSON lacks is the
    string "NaN", "Infinity" or "-Infinity". `convert/report/schema.py` has its schema.

    Raises:
        ArtifactError: facts are missing.
        OSError: the disk is full or not writable.
    """
    facts = read_facts(found, str(found.get("name", output)))
    output.mkdir(parents=True, exist_ok=True)
    judged = {
        "summary": [asdict(row) for row in summarize(facts)],
        "verdicts": [asdict(verdict) for verdict in judge(facts)],
    }
    document = name_specials({**found, **judged})
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (output / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (output / HTML_NAME).write_text(_page(facts), encoding="utf-8")


# --- The page


@dataclass(frozen=True)
class Tile:
    """A number to remember: label, number, remark; good, bad or neither."""

    label: str
    figure: str
    remark: str
    good: bool | None = None


def _page(facts: ReportFacts) -> str:
    rows = summarize(facts)
    return load_template(_TEMPLATE_NAME).render(
        facts=facts,
        badge=_badge(rows),
        verdicts=list(judge(facts)),
        model=facts.exported,
        tiles=list(_tiles(facts)),
        models=describe_models(facts),
        figure=facts.figure("dense"),
        figure_title=figure_title(facts.figure("dense")),
        summary=Grid(summary_columns(facts), tuple(row_cells(row) for row in rows)),
        first_onnx_row=next((n for n, row in enumerate(rows) if row.passed is not None), None),
        figure_note=_figure_note(facts),
        trained=trained_table(facts),
        domains=domain_table(facts),
        branches=branch_table(facts.branches),
        branch_blocks=next((found.num_blocks for found in facts.branches.values()), 0),
        oracle=oracle_table(facts.finetune.oracle),
        every_figure=figure_table(facts),
        labels=label_table(facts),
        confusions=confusion_table(facts),
        routers=describe_routers(facts),
        pictures=draw_pictures(facts, rows),
        distances=distance_table(facts.upcycle),
        soup=soup_table(facts.upcycle),
        receipt=receipt_tables(facts.upcycle.receipt),
        tiers=tier_table(facts.variants),
        parity=parity_sections(facts),
        builds=build_table(facts),
        timings=timing_table(facts),
        costs=cost_grid(facts.costs),
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


def _subtitle(facts: ReportFacts) -> str:
    source, upcycle = facts.source, facts.upcycle
    experts = f"{upcycle.num_experts} experts a layer, top-{upcycle.num_experts_per_tok}"
    return f"{source.architecture} of {format_count(source.num_parameters)} parameters → {upcycle.target}, {experts}"


def _tiles(facts: ReportFacts) -> Iterator[Tile]:
    """The few figures to remember."""
    source, upcycle, model = facts.source, facts.upcycle, facts.exported
    parameters = f"{format_count(source.num_parameters)} → {format_count(upcycle.num_parameters)}"
    yield Tile("Parameters", parameters, "dense model → mixture of experts")
    active = upcycle.num_active_parameters
    yield Tile(
        "Parameters used for a token",
        format_count(active),
        f"{active / source.num_parameters:.2f} × the dense model's, which uses all of its own",
    )
    figure = facts.figure(model)
    step, words, good = describe_step(facts.figure("dense"), figure)
    yield Tile(
        f"{figure_title(figure)} ({figure.better} is better)",
        step,
        f"{words}: dense → {model}, on held-out text",
        good,
    )
    if facts.variants:
        yield _smallest_tile(facts)


def _smallest_tile(facts: ReportFacts) -> Tile:
    """The smallest package that passed; one that failed is nothing to remember."""
    label = "Smallest ONNX model that passed"
    passed = {name: found.onnx.package_bytes for name, found in facts.variants.items() if found.parity.passed}
    if not passed:
        return Tile(label, NONE, "no ONNX model agrees with torch within its limits", good=False)
    name = min(passed, key=lambda each: passed[each])
    whole = format_size(facts.finetune.evaluations[facts.exported].weight_bytes)
    return Tile(label, format_size(passed[name]), f"{name}; the {facts.exported} checkpoint has {whole}")


def _figure_note(facts: ReportFacts) -> str:
    """A warning where parity measured the figure on other text."""
    measured = next((m for found in facts.variants.values() if (m := found.parity.measured)), None)
    tuned = facts.figure(facts.exported)
    if measured is None or figures_agree(tuned, measured.finetuned_figures[0], 3):
        return ""
    return (
        f"Parity measures {tuned.name} on text of its own, where the {facts.exported} torch model has "
        f"{format_figure(measured.finetuned_figures[0])} (and {format_figure(tuned)} above): "
        "compare ONNX rows with each other and with that figure."
    )
