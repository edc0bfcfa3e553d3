"""The report: one self-contained page, and the same facts as JSON.

Everything here is computed from the facts that the stages returned; nothing is measured and no checkpoint is opened. Sentences are chosen by the
numbers, so a run that lost says so. The badge is parity's: did every exported variant agree with torch within its limits? Whether fine-tuning paid
is a finding, not a failure, and stands beside it.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox
from rich import box
from rich.table import Table
from rich.text import Text

HTML_NAME = "report.html"
JSON_NAME = "report.json"

_TEMPLATE_NAME = "report.html.j2"
_TORCH_MODELS = ("dense", "upcycled", "dense continued", "fine-tuned")
_COLUMNS = ("Model", "Perplexity", "Size", "Top-1 agreement", "Routing agreement", "Decode tokens/s", "Prefill tokens/s", "Parity")
_NONE = "—"


@dataclass(frozen=True)
class Row:
    """One model in the summary; agreement is with the fine-tuned torch model, routing agreement that of the worst layer, both shares."""

    name: str
    perplexity: float | None
    size_bytes: int
    top1_agreement: float | None
    routing_agreement: float | None
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    passed: bool | None


@dataclass(frozen=True)
class _Verdict:
    text: str
    good: bool | None


@dataclass(frozen=True)
class _Grid:
    """A table of the page, its cells already text; columns in which every cell is a number align right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        return tuple(all(re.match(rf"[<>−-]?\d|NaN|∞|{_NONE}", row[n]) for row in self.rows) for n in range(len(self.headers)))


@dataclass(frozen=True)
class _Picture:
    title: str
    svg: Markup
    alt: str
    caption: str


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


def summarize(facts: dict[str, Any]) -> list[Row]:
    """One row for each torch model and each ONNX variant, in the order in which they came to be.

    A variant's figures are those of the CPU, which parity always runs on, or else of the first provider that ran.
    """
    evaluations = facts["finetune"]["evaluations"]
    rows = []
    for name in _TORCH_MODELS:
        if name in evaluations:
            e = evaluations[name]
            rows.append(Row(name, e["perplexity"], e["weight_bytes"], None, None, e["decode_tokens_per_second"], None, None))
    for name, variant in facts["variants"].items():
        measured, size, passed = _measured(variant), variant["onnx"]["package_bytes"], variant["parity"]["passed"]
        if measured is None:
            rows.append(Row(f"ONNX {name}", None, size, None, None, None, None, passed))
            continue
        agreement = measured["finetuned"]
        routing, decode = min(agreement["routing_agreement"], default=None), measured["decode_tokens_per_second"]
        prefill, perplexity = measured["prefill_tokens_per_second"], measured["perplexity"]
        rows.append(Row(f"ONNX {name}", perplexity, size, agreement["top1_agreement"], routing, decode, prefill, passed))
    return rows


def summary_table(facts: dict[str, Any]) -> Table:
    """The summary for the terminal; fits in 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(_COLUMNS):
        justify: Literal["left", "right"] = "left" if number in (0, len(_COLUMNS) - 1) else "right"
        table.add_column(header.replace(" ", "\n"), justify=justify, vertical="bottom", no_wrap=True)
    rows = summarize(facts)
    for number, row in enumerate(rows):
        *cells, parity = (Text(cell) for cell in _cells(row))
        parity.stylize({True: "green", False: "bold red", None: "dim"}[row.passed])
        following = rows[number + 1] if number + 1 < len(rows) else row
        table.add_row(*cells, parity, end_section=row.passed is None and following.passed is not None)
    return table


def verdict_lines(facts: dict[str, Any]) -> list[str]:
    """What the numbers say, in plain sentences: upcycling, fine-tuning, and each variant."""
    return [verdict.text for verdict in _verdicts(facts)]


def _verdicts(facts: dict[str, Any]) -> Iterator[_Verdict]:
    evaluations = facts["finetune"]["evaluations"]
    yield _upcycling_verdict(evaluations["dense"]["perplexity"], evaluations["upcycled"]["perplexity"])
    yield _finetuning_verdict(facts)
    variants = facts["variants"]
    reference = _measured(variants["float32"]) if "float32" in variants else None
    for name, variant in variants.items():
        yield _variant_verdict(name, variant, reference)
    if not variants:
        yield _Verdict("No ONNX variant was asked for, so nothing was exported and no parity was checked.", None)


def _upcycling_verdict(dense: float, upcycled: float) -> _Verdict:
    figures = f"{_perplexity(dense, 5)} dense, {_perplexity(upcycled, 5)} upcycled"
    if _agree(dense, upcycled, 4):
        return _Verdict(f"Upcycling kept the perplexity to 4 digits: {figures}, before any training.", True)
    return _Verdict(f"Upcycling did NOT keep the perplexity to 4 digits: {figures}, before any training.", False)


def _finetuning_verdict(facts: dict[str, Any]) -> _Verdict:
    evaluations = facts["finetune"]["evaluations"]
    tuned = evaluations["fine-tuned"]["perplexity"]
    if "dense continued" not in evaluations:
        dense = evaluations["dense"]["perplexity"]
        return _Verdict(
            f"Fine-tuning took the perplexity from {_perplexity(dense)} to {_perplexity(tuned)}; without a dense control (finetune.control) "
            "the report cannot say whether the mixture helped or the tokens did.",
            None,
        )
    control = evaluations["dense continued"]["perplexity"]
    figures = f"{_perplexity(tuned)} against {_perplexity(control)}"
    if tuned < control and _agree(tuned, control, 4):
        return _Verdict(
            f"NOT lower by more than rounding: the fine-tuned mixture and the dense model continued on the same tokens agree to 4 digits; "
            f"perplexity {figures}.",
            None,
        )
    if tuned < control:
        return _Verdict(
            "The fine-tuned mixture beats the dense model continued on the same tokens: "
            f"perplexity lower by {_share(1 - tuned / control)}, {figures}.",
            True,
        )
    return _Verdict(
        f"NOT lower: the fine-tuned mixture does not beat the dense model continued on the same tokens; perplexity {figures}, "
        f"{_change(tuned, control)} the control's.",
        False,
    )


def _variant_verdict(name: str, variant: dict[str, Any], reference: dict[str, Any] | None) -> _Verdict:
    measured, parity = _measured(variant), variant["parity"]
    if measured is None:
        text = "perplexity not measured"
    elif reference is None or name == "float32":
        torch_perplexity = measured["finetuned_perplexity"]
        text = f"perplexity {_perplexity(measured['perplexity'])}, {_change(measured['perplexity'], torch_perplexity)} the fine-tuned torch model's"
    else:
        text = f"perplexity {_perplexity(measured['perplexity'])}, {_change(measured['perplexity'], reference['perplexity'])} float32 ONNX's"
    if parity["passed"]:
        return _Verdict(f"ONNX {name}: {text}; parity passed.", True)
    return _Verdict(f"ONNX {name}: {text}; parity FAILED: {'; '.join(parity['breaches']) or 'no reason given'}.", False)


def _measured(variant: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the CPU provider, or of the first that ran; a provider that did not run is a sentence."""
    ran = {name: found for name, found in variant["parity"]["providers"].items() if isinstance(found, dict)}
    return ran.get("CPUExecutionProvider") or next(iter(ran.values()), None)


# --- Numbers as text


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _perplexity(row.perplexity),
        _size(row.size_bytes),
        _agreement(row.top1_agreement),
        _agreement(row.routing_agreement),
        _rounded(row.decode_tokens_per_second),
        _rounded(row.prefill_tokens_per_second),
        {True: "passed", False: "FAILED", None: _NONE}[row.passed],
    )


def _agree(a: float, b: float, digits: int) -> bool:
    """Whether two positive numbers differ by at most half a unit in the last of so many digits."""
    if not (math.isfinite(a) and math.isfinite(b) and a > 0):
        return False
    return abs(a - b) <= 0.5 * 10.0 ** (math.floor(math.log10(a)) + 1 - digits)


def _special(value: float) -> str | None:
    """The text of a number that is none."""
    return None if math.isfinite(value) else "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _perplexity(value: float | None, digits: int = 4) -> str:
    if value is None:
        return _NONE
    if value >= 1e7 or _special(value):
        return _special(value) or f"{value:.3e}"
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def _rounded(value: float | None) -> str:
    if value is None:
        return _NONE
    return _special(value) or (f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}")


def _error(value: float) -> str:
    return _special(value) or ("0" if value == 0 else re.sub(r"e([+-])0", r"e\1", f"{value:.1e}"))


def _agreement(value: float | None) -> str:
    """A share as a percentage; 100 % only when nothing at all differs."""
    if value is None:
        return _NONE
    if special := _special(value):
        return special
    text = f"{100 * value:.2f}"
    return "100 %" if value == 1 else ">99.99 %" if text == "100.00" else f"{text} %"


def _share(value: float) -> str:
    percent = 100 * abs(value)
    return _special(percent) or ("less than 0.01 %" if percent < 0.01 else f"{percent:.2f} %" if percent < 10 else f"{percent:,.0f} %")


def _change(new: float, old: float) -> str:
    """How `new` stands to `old`, ready to be followed by a possessive: "1.20 % above"."""
    if not (math.isfinite(new) and math.isfinite(old) and old > 0):
        return "not comparable with"
    if new == old:
        return "equal to"
    return f"{_share(new / old - 1)} {'above' if new > old else 'below'}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest unit that fits: 4.13 M."""
    scale, unit = next(((s, u) for s, u in units if value >= 0.9995 * s), units[-1])
    number = value / scale
    return f"{number:.0f} {unit}".strip() if number >= 99.95 or scale == 1 else f"{number:#.3g} {unit}"


def _size(num_bytes: float) -> str:
    return _scaled(num_bytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def _count(number: float) -> str:
    return _scaled(number, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")))


def _tick(text: str) -> str:
    """A scaled number without zeros behind the point: 50.0 k becomes 50 k."""
    return re.sub(r"\.0+(?= )|(?<=\.\d)0(?= )", "", text)


def _value(name: str, value: Any) -> str:
    """A fact whose name is all that is known about it."""
    match value:
        case None:
            return _NONE
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return _size(value)
        case int():
            return f"{value:,}" if "num_" in name else str(value)
        case float() if "agreement" in name:
            return _agreement(value)
        case float() if "error" in name or name in ("rel", "kl"):
            return _error(value)
        case float():
            return _special(value) or f"{value:.5g}"
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
        verdicts=list(_verdicts(facts)),
        tiles=list(_tiles(facts)),
        summary=_Grid(_COLUMNS, tuple(_cells(row) for row in rows)),
        first_onnx_row=next((n for n, row in enumerate(rows) if row.passed is not None), None),
        perplexity_note=_perplexity_note(facts),
        pictures=_pictures(facts, rows),
        receipt=_records(facts["upcycle"]["receipt"]),
        parity=list(_parity_sections(facts)),
        builds=_builds(facts),
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
    return f"{source['architecture']} of {_count(source['num_parameters'])} parameters → {upcycle['target']}, {experts}"


def _tiles(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The few figures to remember: label, number, remark."""
    source, upcycle, evaluations = facts["source"], facts["upcycle"], facts["finetune"]["evaluations"]
    yield "Parameters", f"{_count(source['num_parameters'])} → {_count(upcycle['num_parameters'])}", "dense → mixture"
    active = upcycle["num_active_parameters"]
    yield "Active a token", _count(active), f"{active / source['num_parameters']:.2f} × the dense model's"
    dense, tuned = (evaluations[name]["perplexity"] for name in ("dense", "fine-tuned"))
    yield "Perplexity", f"{_perplexity(dense, 3)} → {_perplexity(tuned, 3)}", "dense → fine-tuned, on held-out text"
    if facts["variants"]:
        name, size = min(((n, v["onnx"]["package_bytes"]) for n, v in facts["variants"].items()), key=lambda pair: pair[1])
        yield "Smallest ONNX", _size(size), f"{name}; torch float32 has {_size(evaluations['fine-tuned']['weight_bytes'])}"


def _perplexity_note(facts: dict[str, Any]) -> str:
    """A warning where parity measured perplexity on other text than the evaluations did."""
    measured = next((m for m in map(_measured, facts["variants"].values()) if m), None)
    tuned = facts["finetune"]["evaluations"]["fine-tuned"]["perplexity"]
    if measured is None or _agree(tuned, measured["finetuned_perplexity"], 3):
        return ""
    there = _perplexity(measured["finetuned_perplexity"])
    return (
        f"Parity measures perplexity on text of its own, where the fine-tuned torch model has {there} (and {_perplexity(tuned)} above): "
        "compare ONNX rows with each other and with that figure."
    )


def _records(records: Sequence[dict[str, Any]]) -> _Grid:
    """Records as a table; a column for every name that any of them has."""
    names = tuple(dict.fromkeys(name for record in records for name in record))
    return _Grid(tuple(_words(n) for n in names), tuple(tuple(_value(n, r.get(n)) for n in names) for r in records))


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
        f"onnxruntime {found['onnxruntime']}; perplexity {_perplexity(found['perplexity'])}, twin {_perplexity(found['twin_perplexity'])}, "
        f"fine-tuned {_perplexity(found['finetuned_perplexity'])}; worst layer {found['worst_layer']}; "
        f"prefill {_rounded(found['prefill_tokens_per_second'])} and decode {_rounded(found['decode_tokens_per_second'])} tokens a second"
    )


def _agreements(found: dict[str, Any]) -> _Grid:
    headers = ("against", "max error", "mean error", "KL, nats", "top-1 agreement", "worst routing", "worst hidden error")
    rows = []
    for key, name in (("twin", "torch twin, same quantized weights"), ("finetuned", "fine-tuned torch model, float32")):
        a = found[key]
        routing, hidden = min(a["routing_agreement"], default=None), max(a["hidden_error"], default=None)
        errors = (_error(a["max_error"]), _error(a["mean_error"]), _error(a["kl"]))
        rows.append((name, *errors, _agreement(a["top1_agreement"]), _agreement(routing), _NONE if hidden is None else _error(hidden)))
    return _Grid(headers, tuple(rows))


def _builds(facts: dict[str, Any]) -> _Grid:
    """How each variant was quantized and exported: a row for each fact, a column for each variant."""
    columns = {name: dict(_pairs({"quantize": v["quantize"], "onnx": v["onnx"]})) for name, v in facts["variants"].items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return _Grid(("fact", *columns), tuple((name, *(column.get(name, _NONE) for column in columns.values())) for name in names))


def _provenance(facts: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    shown = {"finetune": ("evaluations", "history", "warnings"), "upcycle": ("receipt",)}
    elsewhere = {"name", "recipe", "variants"}
    sections = {key: value for key, value in facts.items() if key not in elsewhere}
    yield "run", [pair for key, value in sections.items() if not isinstance(value, dict) for pair in _pairs(value, key)]
    for key, value in sections.items():
        if isinstance(value, dict):
            yield key, list(_pairs({k: v for k, v in value.items() if k not in shown.get(key, ())}))


# --- The pictures

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dense2moe",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.linewidth": 0.7,
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#8a8a8a",
    "ytick.color": "#8a8a8a",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": "#222222",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#767676"
_PALETTE = (_BLUE, "#009e73", _ORANGE, "#cc79a7", "#7a5195", "#b8860b")  # Okabe and Ito's, told apart by the colour-blind too
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INCHES = (4.8, 3.1)  # 346 points: shown at about its own size on a phone, so that the text stays readable there


def _pictures(facts: dict[str, Any], rows: Sequence[Row]) -> list[_Picture]:
    agreements = {name: m["finetuned"] for name, v in facts["variants"].items() if (m := _measured(v))}
    logged = [step for step in facts["finetune"]["history"] if step["layers"]]
    pictures = []
    with matplotlib.rc_context(_RC):
        if any(step["validation_loss"] is not None for step in facts["finetune"]["history"]):
            pictures.append(_training_picture(facts["finetune"]))
        pictures.append(_size_picture(rows))
        if logged:
            pictures += [_load_picture(logged[-1]), _balance_picture(logged)]
        if any(a["routing_agreement"] for a in agreements.values()):
            pictures.append(_routing_picture(agreements))
        if any(a["hidden_error"] for a in agreements.values()):
            pictures.append(_hidden_picture(agreements))
    return pictures


def _training_picture(finetune: dict[str, Any]) -> _Picture:
    figure, axes = _axes("tokens", "loss, nats a token")
    ends = {}
    for name, label, color, dash in (("dense continued", "dense control", _ORANGE, (0, (4, 1.5))), ("fine-tuned", "mixture", _BLUE, "solid")):
        steps = [step for step in finetune["history"] if step["model"] == name]
        train = [(s["num_tokens"], s["train_loss"]) for s in steps if s["train_loss"] is not None]
        validation = [(s["num_tokens"], s["validation_loss"]) for s in steps if s["validation_loss"] is not None]
        best = [
            (s["num_tokens"], s["validation_loss"])
            for s in steps
            if s["step"] == finetune["best_steps"].get(name) and s["validation_loss"] is not None
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, linestyle=dash, linewidth=0.9, alpha=0.5, label=f"{label}, train")
        if validation:
            axes.plot(*zip(*validation, strict=True), color=color, linestyle=dash, marker=".", markersize=5, label=f"{label}, validation")
            ends[label] = min(loss for _, loss in validation)
        if best:
            axes.plot(*zip(*best, strict=True), "o", color=color, markerfacecolor="none", markersize=9, markeredgewidth=1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(handlelength=2.2, labelspacing=0.35)
    reached = " and ".join(f"{loss:.3f} for the {label}" for label, loss in reversed(ends.items()))
    return _Picture(
        "Training",
        _svg(figure, "training"),
        "Line chart: training and validation loss against tokens.",
        f"The validation loss reached {reached}; a ring marks the weights that were kept.",
    )


def _size_picture(rows: Sequence[Row]) -> _Picture:
    figure, axes = _axes("size of the files", "perplexity on held-out text")
    placed = [(row, row.perplexity) for row in rows if row.perplexity is not None and math.isfinite(row.perplexity)]
    for row, perplexity in placed:
        onnx = row.passed is not None
        axes.plot(row.size_bytes, perplexity, "o" if onnx else "s", color=_BLUE if onnx else _GREY, markersize=6, zorder=3)
    axes.set_xscale(_scale([row.size_bytes for row, _ in placed]))
    axes.set_yscale(_scale([perplexity for _, perplexity in placed]))
    _ticks(axes.xaxis, [row.size_bytes for row, _ in placed], lambda value: _tick(_size(value)))
    _ticks(axes.yaxis, [perplexity for _, perplexity in placed], lambda value: f"{value:.4g}")
    axes.margins(0.16)
    _place_labels(figure, axes, [(row.size_bytes, perplexity, row.name) for row, perplexity in placed])
    exports = {row.name: (row.size_bytes, perplexity) for row, perplexity in placed if row.passed is not None}
    caption = "Down and to the left is better."
    if "ONNX float32" in exports and len(exports) > 1:
        whole_size, whole_perplexity = exports["ONNX float32"]
        name, (size, perplexity) = min(exports.items(), key=lambda item: item[1])
        caption = (
            f"Down and to the left is better: {name} is {whole_size / size:.1f} times smaller than ONNX float32, "
            f"its perplexity {_change(perplexity, whole_perplexity)} that one's."
        )
    return _Picture("Size and perplexity", _svg(figure, "size"), "Scatter chart: perplexity against file size, a point for each model.", caption)


def _load_picture(step: dict[str, Any]) -> _Picture:
    shares = _fair_shares(step)
    num_layers, num_experts = len(shares), max(map(len, shares))
    figure, axes = _axes("expert", "layer")
    axes.grid(visible=False)
    largest = max(2.0, *(share for layer in shares for share in layer))
    colors = matplotlib.colormaps["PuOr_r"].resampled(41)  # under 50 levels the colour bar stays a drawing
    mesh = axes.pcolormesh(shares, cmap=colors, norm=TwoSlopeNorm(1.0, 0.0, largest), edgecolors="white", linewidth=1.0 if num_experts <= 32 else 0)
    axes.set_ylim(num_layers, 0)
    for axis, number in ((axes.xaxis, num_experts), (axes.yaxis, num_layers)):
        stride = math.ceil(number / 16)
        axis.set_ticks([n + 0.5 for n in range(0, number, stride)], [str(n) for n in range(0, number, stride)])
        axis.set_tick_params(length=0)
    if num_experts <= 8 and num_layers <= 16:
        for y, layer in enumerate(shares):
            for x, share in enumerate(layer):
                dark = share < 0.3 or share > 1 + 0.7 * (largest - 1)
                axes.text(x + 0.5, y + 0.5, f"{share:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label="load ÷ fair share", ticks=[0, 0.5, 1, *_even(largest)], fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")
    bar.ax.grid(visible=False)
    cells = [(share, y, x) for y, layer in enumerate(shares) for x, share in enumerate(layer)]
    (high, y, x), low = max(cells, key=itemgetter(0)), min(cells, key=itemgetter(0))
    return _Picture(
        "Expert load",
        _svg(figure, "load"),
        "Heat map: load of each expert in each layer, relative to its fair share.",
        f"At step {step['step']} the busiest expert ({x} of layer {y}) got {high:.2f} times its fair share of the tokens "
        f"and the idlest ({low[2]} of layer {low[1]}) {low[0]:.2f} times.",
    )


def _balance_picture(logged: Sequence[dict[str, Any]]) -> _Picture:
    figure, axes = _axes("tokens", "load ÷ fair share")
    tokens = [step["num_tokens"] for step in logged]
    highest = [max(max(layer) for layer in _fair_shares(step)) for step in logged]
    lowest = [min(min(layer) for layer in _fair_shares(step)) for step in logged]
    axes.fill_between(tokens, lowest, highest, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(tokens, highest, color=_BLUE, label="busiest expert of any layer")
    axes.plot(tokens, lowest, color=_BLUE, linestyle=(0, (4, 1.5)), label="idlest expert of any layer")
    axes.axhline(1, color=_GREY, linewidth=0.9)
    axes.set_ylim(0, 1.25 * max(1.6, *highest))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(_count(value))))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(loc="upper right", handlelength=2.2, labelspacing=0.35)
    return _Picture(
        "Load over training",
        _svg(figure, "balance"),
        "Line chart: largest and smallest expert load against tokens, relative to the fair share.",
        f"Experts that share the work evenly all stand at 1: the busiest went from {highest[0]:.2f} to {highest[-1]:.2f}, "
        f"the idlest from {lowest[0]:.2f} to {lowest[-1]:.2f}.",
    )


def _routing_picture(agreements: dict[str, dict[str, Any]]) -> _Picture:
    figure, axes = _axes("layer", "routing agreement")
    _layer_lines(axes, {name: a["routing_agreement"] for name, a in agreements.items()})
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    worst, layer, name = min((share, n, name) for name, a in agreements.items() for n, share in enumerate(a["routing_agreement"]))
    return _Picture(
        "Routing agreement",
        _svg(figure, "routing"),
        "Line chart: routing agreement by layer, a line for each ONNX variant.",
        f"The lowest is {_agreement(worst)}, of {name} in layer {layer}; at 100 % every token visits the experts that the fine-tuned model chooses."
        if worst < 1
        else "Every variant sends every token to the fine-tuned model's experts.",
    )


def _hidden_picture(agreements: dict[str, dict[str, Any]]) -> _Picture:
    errors = {name: a["hidden_error"] for name, a in agreements.items() if a["hidden_error"]}
    figure, axes = _axes("layer", "relative error of the hidden state")
    _layer_lines(axes, {name: [value if value > 0 else math.nan for value in layers] for name, layers in errors.items()})
    if any(value > 0 for layers in errors.values() for value in layers):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _error(value).replace(".0e", "e")))
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = ", ".join(f"{_error(layers[-1])} ({name})" for name, layers in errors.items())
    return _Picture(
        "Hidden-state error",
        _svg(figure, "hidden"),
        "Line chart on a logarithmic scale: relative hidden-state error by layer, a line for each ONNX variant.",
        f"After the last layer the hidden states differ from the fine-tuned model's by {ends}.",
    )


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES, dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _layer_lines(axes: Axes, lines: dict[str, list[float]]) -> None:
    """A line for each variant over the layers; markers differ, so that equal lines and print in grey can be read."""
    for number, (name, values) in enumerate(lines.items()):
        style = {"color": _PALETTE[number % len(_PALETTE)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(range(len(values)), values, label=name, markersize=5 if len(values) <= 16 else 2.5, **style)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend(labelspacing=0.35, handlelength=2.2)


def _fair_shares(step: dict[str, Any]) -> list[list[float]]:
    """Load of each expert of each layer over what it would be if all were equal."""
    return [[share * len(layer["load"]) for share in layer["load"]] for layer in step["layers"]]


def _even(largest: float) -> list[float]:
    stride = max(1, math.ceil((largest - 1) / 4))
    return [float(tick) for tick in range(1 + stride, math.floor(largest) + 1, stride)]


def _scale(values: Sequence[float]) -> Literal["log", "linear"]:
    """Logarithmic where positive values span more than a factor of three."""
    return "log" if values and max(values) > 3 * min(values) > 0 else "linear"


def _ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Ticks as dense as the span of the values allows, written by `text`."""
    if _scale(values) == "log":
        ratio = max(values) / min(values)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 15 else (1, 2, 5) if ratio < 500 else (1,), numticks=30))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, at the first of some places where it covers nothing else, or else where it covers least."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [Bbox(axes.transData.transform([(x, y), (x, y)])).padded(4) for x, y, _ in points]
    places = [(8, 0), (-8, 0), (0, 10), (0, -10), (7, 9), (-7, 9), (7, -9), (-7, -9), (0, 20), (0, -20), (7, 19), (-7, 19), (7, -19), (-7, -19)]
    for x, y, name in points:
        found = []
        for number, (right, up) in enumerate(places):
            horizontal = "left" if right > 0 else "right" if right < 0 else "center"
            label = axes.annotate(
                name, (x, y), (right, up), textcoords="offset points", ha=horizontal, va="center", fontsize=8.5, in_layout=False, parse_math=False
            )
            bounds = label.get_window_extent()
            covered = sum(bounds.overlaps(other) for other in taken) + 2 * (not frame.containsx(bounds.x0) or not frame.containsx(bounds.x1))
            found.append((covered, number, label, bounds))
        chosen = min(found, key=lambda item: item[:2])
        for candidate in found:
            if candidate is not chosen:
                candidate[2].remove()
        taken.append(chosen[3])


def _svg(figure: Figure, prefix: str) -> Markup:
    """The drawing as an `svg` element to stand in a page: no prolog, metadata or style of its own, and ids that no other picture has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", text, count=1), count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return Markup(text.replace("<svg", '<svg aria-hidden="true"', 1))  # noqa: S704, matplotlib escapes the text in a drawing
