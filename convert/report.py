"""The report: one self-contained page, and the same facts as JSON.

Everything here is computed from the facts that the stages returned; nothing is measured and no checkpoint is opened. Sentences are chosen by the
numbers, so a run that lost says so. The badge is parity's: did every exported variant agree with torch within its limits? Whether fine-tuning paid
is a finding, not a failure, and stands beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from convert.numerals import (
    NONE,
    agree,
    format_agreement,
    format_count,
    format_error,
    format_perplexity,
    format_rounded,
    format_seconds,
    format_size,
    format_special,
)
from convert.pictures import draw_pictures
from convert.summary import COLUMNS, Row, compare_training, find_measured, judge, row_cells, summarize

HTML_NAME = "report.html"
JSON_NAME = "report.json"
_TEMPLATE_NAME = "report.html.j2"


@dataclass(frozen=True)
class _Grid:
    """A table of the page, its cells already text; columns in which every cell is a number align right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        return tuple(all(re.match(rf"[<>−-]?\d|NaN|∞|{NONE}", row[n]) for row in self.rows) for n in range(len(self.headers)))


def write_report(facts: dict[str, Any], output: Path) -> None:
    """Write `report.html` and `report.json` into the directory `output`.

    The page needs no other file and no network. The JSON is the facts and, under "summary", the rows of `summarize`; its keys are sorted, and a
    number that JSON lacks is the string "NaN", "Infinity" or "-Infinity".

    Raises:
        OSError: the disk is full or not writable.
    """
    output.mkdir(parents=True, exist_ok=True)
    document = _strict({**facts, "summary": [asdict(row) for row in summarize(facts)]})
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (output / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (output / HTML_NAME).write_text(_page(facts), encoding="utf-8")


def _value(name: str, value: Any) -> str:
    """A fact whose name is all that is known about it."""
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return format_size(value)
        case int():
            return f"{value:,}" if "num_" in name else str(value)
        case float() if "agreement" in name:
            return format_agreement(value)
        case float() if "error" in name or name in ("rel", "kl"):
            return format_error(value)
        case float():
            return format_special(value) or f"{value:.5g}"
        case _:
            return str(value)


def _pairs(facts: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Facts as names and texts, nested ones with dotted names; lists that are long or of records are counted, since the JSON has them."""
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from _pairs(value, f"{name}.{key}" if name else str(key))
    elif isinstance(facts, list):
        small = len(facts) <= 16 and not any(isinstance(item, (dict, list)) for item in facts)
        yield name, ", ".join(_value(name, item) for item in facts) if small else f"{len(facts)} entries, in {JSON_NAME}"
    else:
        yield name, _value(name, facts)


def _strict(value: Any) -> Any:
    """The same value with non-finite floats as strings."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# --- The page


def _page(facts: dict[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE_NAME).read_text(encoding="utf-8"))
    rows = summarize(facts)
    return template.render(
        facts=facts,
        badge=_badge(rows),
        verdicts=list(judge(facts)),
        tiles=list(_tiles(facts)),
        summary=_Grid(COLUMNS, tuple(row_cells(row) for row in rows)),
        first_onnx_row=next((n for n, row in enumerate(rows) if row.passed is not None), None),
        perplexity_note=_perplexity_note(facts),
        trained=_trained(facts),
        pictures=draw_pictures(facts, rows),
        receipt=_receipt(facts["upcycle"]["receipt"]),
        parity=list(_parity_sections(facts)),
        builds=_builds(facts),
        timings=_timings(facts),
        provenance=list(_provenance(facts)),
        json_name=JSON_NAME,
        subtitle=_subtitle(facts),
    )


def _badge(rows: Sequence[Row]) -> dict[str, str]:
    results = [row.passed for row in rows if row.passed is not None]
    if not results:
        return {"kind": "none", "word": "NO PARITY", "text": "No ONNX variant was exported."}
    counted = f"{sum(results)} of {len(results)} ONNX variants agree with torch within their limits."
    return {"kind": "pass", "word": "PASS", "text": counted} if all(results) else {"kind": "fail", "word": "FAIL", "text": counted}


def _subtitle(facts: dict[str, Any]) -> str:
    source, upcycle = facts["source"], facts["upcycle"]
    experts = f"{upcycle['num_experts']} experts a layer, top-{upcycle['num_experts_per_tok']}"
    return f"{source['architecture']} of {format_count(source['num_parameters'])} parameters → {upcycle['target']}, {experts}"


def _tiles(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The few figures to remember: label, number, remark."""
    source, upcycle, evaluations = facts["source"], facts["upcycle"], facts["finetune"]["evaluations"]
    yield "Parameters", f"{format_count(source['num_parameters'])} → {format_count(upcycle['num_parameters'])}", "dense → mixture"
    active = upcycle["num_active_parameters"]
    yield "Active a token", format_count(active), f"{active / source['num_parameters']:.2f} × the dense model's"
    dense, tuned = (evaluations[name]["perplexity"] for name in ("dense", "fine-tuned"))
    yield "Perplexity", f"{format_perplexity(dense, 3)} → {format_perplexity(tuned, 3)}", "dense → fine-tuned, on held-out text"
    if facts["variants"]:
        name, size = min(((n, v["onnx"]["package_bytes"]) for n, v in facts["variants"].items()), key=lambda pair: pair[1])
        yield "Smallest ONNX", format_size(size), f"{name}; torch float32 has {format_size(evaluations['fine-tuned']['weight_bytes'])}"


def _perplexity_note(facts: dict[str, Any]) -> str:
    """A warning where parity measured perplexity on other text than the evaluations did."""
    measured = next((m for m in map(find_measured, facts["variants"].values()) if m), None)
    tuned = facts["finetune"]["evaluations"]["fine-tuned"]["perplexity"]
    if measured is None or agree(tuned, measured["finetuned_perplexity"], 3):
        return ""
    there = format_perplexity(measured["finetuned_perplexity"])
    return (
        f"Parity measures perplexity on text of its own, where the fine-tuned torch model has {there} (and {format_perplexity(tuned)} above): "
        "compare ONNX rows with each other and with that figure."
    )


def _trained(facts: dict[str, Any]) -> _Grid:
    """What the mixture reached and took, and the dense models that were trained beside it."""
    headers = ("Trained", "Loss, nats", "Perplexity", "Active parameters", "Decode tokens/s", "Training time", "Steps")
    return _Grid(
        headers,
        tuple(
            (
                row.name,
                format_special(row.loss) or f"{row.loss:.4f}",
                format_perplexity(row.perplexity),
                format_count(row.num_active_parameters),
                format_rounded(row.decode_tokens_per_second),
                format_seconds(row.seconds),
                f"{row.num_steps:,}",
            )
            for row in compare_training(facts)
        ),
    )


def _records(records: Sequence[dict[str, Any]]) -> _Grid:
    """Records as a table; a column for every name that any of them has."""
    names = tuple(dict.fromkeys(name for record in records for name in record))
    return _Grid(tuple(_words(n) for n in names), tuple(tuple(_value(n, r.get(n)) for n in names) for r in records))


def _receipt(comparisons: Sequence[dict[str, Any]]) -> _Grid:
    """The receipt: a row for each router, text and experts implementation, a column for each dtype."""
    dtypes = tuple(dict.fromkeys(c["dtype"] for c in comparisons))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for c in comparisons:
        row = (f"{c['router']} router", c["text"], c["experts"], f"{c['num_tokens']:,}")
        cells.setdefault(row, {})[c["dtype"]] = "bitwise equal" if c["bitwise"] else format_error(c["rel"])
    return _Grid(
        ("router", "text", "experts", "tokens", *dtypes), tuple((*row, *(found.get(d, NONE) for d in dtypes)) for row, found in cells.items())
    )


def _words(name: str) -> str:
    known = {"rel": "relative error", "num_tokens": "tokens", "kl": "KL, nats", "top1_agreement": "top-1 agreement", "name": "check"}
    return known.get(name, name.replace("_", " "))


def _parity_sections(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, variant in facts["variants"].items():
        parity = variant["parity"]
        providers = []
        for provider, found in parity["providers"].items():
            if isinstance(found, dict):
                providers.append({"name": provider, "note": _provider_note(found), "grids": [_agreements(found), _records(found["checks"])]})
            else:
                providers.append({"name": provider, "note": str(found), "grids": []})
        yield {"name": name, "passed": parity["passed"], "breaches": parity["breaches"], "providers": providers}


def _provider_note(found: dict[str, Any]) -> str:
    return (
        f"onnxruntime {found['onnxruntime']}; perplexity {format_perplexity(found['perplexity'])}, "
        f"twin {format_perplexity(found['twin_perplexity'])}, fine-tuned {format_perplexity(found['finetuned_perplexity'])}; "
        f"worst layer {found['worst_layer']}; "
        f"prefill {format_rounded(found['prefill_tokens_per_second'])} and decode {format_rounded(found['decode_tokens_per_second'])} tokens a second"
    )


def _agreements(found: dict[str, Any]) -> _Grid:
    headers = ("against", "max error", "mean error", "KL, nats", "top-1 agreement", "worst routing", "worst hidden error")
    rows = []
    for key, name in (("twin", "torch twin, same weights"), ("finetuned", "fine-tuned torch model, float32")):
        a = found[key]
        routing, hidden = min(a["routing_agreement"], default=None), max(a["hidden_error"], default=None)
        errors = (format_error(a["max_error"]), format_error(a["mean_error"]), format_error(a["kl"]))
        rows.append(
            (name, *errors, format_agreement(a["top1_agreement"]), format_agreement(routing), NONE if hidden is None else format_error(hidden))
        )
    return _Grid(headers, tuple(rows))


def _builds(facts: dict[str, Any]) -> _Grid:
    """How each variant was quantized and exported: a row for each fact, a column for each variant."""
    written = {name: {key: value for key, value in v["onnx"].items() if key != "timings"} for name, v in facts["variants"].items()}
    columns = {name: dict(_pairs({"quantize": v["quantize"], "onnx": written[name]})) for name, v in facts["variants"].items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return _Grid(("fact", *columns), tuple((name, *(column.get(name, NONE) for column in columns.values())) for name in names))


def _timings(facts: dict[str, Any]) -> _Grid:
    """The lowerings that were timed to choose one, of each variant the fastest first."""
    headers = ("Variant", "Experts written as", "Prefill tokens/s", "Decode tokens/s", "Request, ms")
    rows = (
        (
            name, time["lowering"], format_rounded(time["prefill_tokens_per_second"]), format_rounded(time["decode_tokens_per_second"]),
            f"{1000 * time['request_seconds']:.1f}",
        )
        for name, variant in facts["variants"].items() for time in variant["onnx"]["timings"]
    )  # fmt: skip
    return _Grid(headers, tuple(rows))


def _provenance(facts: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    shown = {"finetune": ("domains", "evaluations", "history", "warnings"), "upcycle": ("receipt", "receipt_notes")}
    elsewhere = {"name", "recipe", "variants"}
    sections = {key: value for key, value in facts.items() if key not in elsewhere}
    yield "run", [pair for key, value in sections.items() if not isinstance(value, dict) for pair in _pairs(value, key)]
    for key, value in sections.items():
        if isinstance(value, dict):
            yield key, list(_pairs({k: v for k, v in value.items() if k not in shown.get(key, ())}))
