"""The report's tables, their cells already text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dense2moe.convert.report.names import JSON_NAME
from dense2moe.convert.report.numerals import (
    NONE,
    format_agreement,
    format_count,
    format_difference,
    format_error,
    format_perplexity,
    format_rounded,
    format_score,
    format_seconds,
    format_share,
    format_size,
    format_special,
)
from dense2moe.convert.report.summary import compare_training, exported_model


@dataclass(frozen=True)
class Grid:
    """A table of the page, its cells already text.

    Columns in which every cell is a number align right, but for the first, which names the row.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers alone."""
        number = re.compile(rf"[<>−-]?\d[\d.,e+-]*( \S+)?|NaN|−?∞|{NONE}")
        return tuple(n > 0 and all(number.fullmatch(row[n]) for row in self.rows) for n in range(len(self.headers)))


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
    """Facts as names and texts, nested ones with dotted names.

    Lists that are long or of records are counted, since the JSON has them.
    """
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from _pairs(value, f"{name}.{key}" if name else str(key))
    elif isinstance(facts, list):
        small = len(facts) <= 16 and not any(isinstance(item, (dict, list)) for item in facts)
        yield (
            name,
            (", ".join(_value(name, item) for item in facts) or NONE)
            if small
            else f"{len(facts)} entries, in {JSON_NAME}",
        )
    else:
        yield name, _value(name, facts)


def trained_table(facts: dict[str, Any]) -> Grid:
    """What the mixture reached and took, and the dense models that were trained beside it."""
    headers = ("Trained", "Loss, nats", "Perplexity", "Active parameters", "Decode tokens/s", "Training time", "Steps")
    return Grid(
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


def _records(records: Sequence[dict[str, Any]]) -> Grid:
    """Records as a table; a column for every name that any of them has a value for."""
    names = tuple(dict.fromkeys(name for record in records for name, value in record.items() if value is not None))
    return Grid(tuple(_words(n) for n in names), tuple(tuple(_value(n, r.get(n)) for n in names) for r in records))


def receipt_table(comparisons: Sequence[dict[str, Any]]) -> Grid:
    """The receipt: a row for each router, text and experts implementation, a column for each dtype."""
    dtypes = tuple(dict.fromkeys(c["dtype"] for c in comparisons))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for c in comparisons:
        row = (f"{c['router']} router", c["text"], c["experts"], f"{c['num_tokens']:,}")
        cells.setdefault(row, {})[c["dtype"]] = _receipt_cell(c)
    return Grid(
        ("router", "text", "experts", "tokens", *dtypes),
        tuple((*row, *(found.get(d, NONE) for d in dtypes)) for row, found in cells.items()),
    )


def _receipt_cell(comparison: dict[str, Any]) -> str:
    if comparison["bitwise"]:
        return "bitwise equal"
    error = format_error(comparison["rel"])
    return f"{error}; bitwise with rounded halves" if comparison.get("halves_bitwise") else error


def _words(name: str) -> str:
    known = {
        "rel": "relative error",
        "num_tokens": "tokens",
        "kl": "KL, nats",
        "top1_agreement": "top-1 agreement",
        "name": "check",
        "num_tie_flips": "tie flips",
        "first_position": "first token beyond",
    }
    return known.get(name, name.replace("_", " "))


def parity_sections(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each variant: whether it passed, why not, and by provider a note, remarks, and tables with their titles."""
    model = exported_model(facts)
    for name, variant in facts["variants"].items():
        parity = variant["parity"]
        providers = []
        for provider, found in parity["providers"].items():
            if isinstance(found, dict):
                tables = [(None, _agreements(found, model)), *_provider_tables(found, model)]
                note, remarks = _provider_note(found, model), list(_remarks(found, model))
                providers.append({"name": provider, "note": note, "remarks": remarks, "tables": tables})
            else:
                providers.append({"name": provider, "note": str(found), "remarks": [], "tables": []})
        yield {"name": name, "passed": parity["passed"], "breaches": parity["breaches"], "providers": providers}


_TOLD_BY_NAME = ("padded", "decoded")
_TIERS = {
    "weights": "Is every row of every matrix in the file the torch twin's?",
    "operator": "Are router and experts of each layer right, on the same input?",
    "layer": "Is every other place, from the embedding to the head?",
    "logits": "Are the logits the same however the tokens are fed?",
    "language": "Does it predict as well?",
    "task": "Does it do its tasks as well?",
    "routing": "Does every token visit the same experts?",
    "files": "Do tokenizer and configs say what the checkpoint's say?",
}


def tier_table(facts: dict[str, Any]) -> Grid:
    """What each tier of parity asks, and its answer for every variant and provider that ran.

    No rows where parity had no tiers.
    """
    found = {
        (name, provider): measured["tiers"]
        for name, variant in facts["variants"].items()
        for provider, measured in variant["parity"]["providers"].items()
        if isinstance(measured, dict) and measured.get("tiers")
    }
    alone = len({provider for _, provider in found}) == 1
    headers = (
        "tier",
        "question",
        *(name if alone else f"{name}, {provider.removesuffix('ExecutionProvider')}" for name, provider in found),
    )
    tiers = dict.fromkeys(tier for answers in found.values() for tier in answers)
    marks = {"broken": "FAILED"}
    answers = {
        tier: [marks.get(answer := str(tiers_of.get(tier, NONE)), answer) for tiers_of in found.values()]
        for tier in tiers
    }
    return Grid(headers, tuple((tier, _TIERS.get(tier, ""), *answers[tier]) for tier in tiers))


def _provider_note(found: dict[str, Any], model: str) -> str:
    worst = "" if found["worst_layer"] is None else f"worst layer {found['worst_layer']}; "
    error = (
        f" ± {format_share(found['perplexity_error'])} on {found['num_language_tokens']:,} tokens"
        if found.get("perplexity_error")
        else ""
    )
    return (
        f"onnxruntime {found['onnxruntime']}; perplexity {format_perplexity(found['perplexity'])}{error}, "
        f"twin {format_perplexity(found['twin_perplexity'])}, {model} "
        f"{format_perplexity(found['finetuned_perplexity'])}; {worst}"
        f"prefill {format_rounded(found['prefill_tokens_per_second'])} and decode "
        f"{format_rounded(found['decode_tokens_per_second'])} tokens a second"
    )


def _remarks(found: dict[str, Any], model: str) -> Iterator[str]:
    """What parity found besides its tables, in sentences; a run of an older version may lack any of it."""
    if isinstance(weights := found.get("weights"), dict):
        told = f"{weights['num_rows']:,} rows and {weights['num_vectors']:,} vectors"
        wrong = (
            f"{weights['num_wrong']:,} of {told} differ from the twin's"
            if weights["num_wrong"]
            else f"all {told} are the twin's"
        )
        yield f"The file's weights were read row by row: {wrong}."
    if isinstance(places := found.get("places"), list) and places:
        worst = max(places, key=_share_of_limit)
        flips = sum(place["num_flips"] for place in places)
        told = f" {flips:,} flips of an 8-bit rounding inside an operator were told apart." if flips else ""
        where = worst["part"] if worst["layer"] < 0 else f"{worst['part']} of layer {worst['layer']}"
        yield (
            f"Each of {len(places):,} places inside the graph was compared on the graph's own input: nearest to its "
            f"limit is the {where}, with an "
            f"error of {format_error(worst['error'])}, at most {format_error(worst['limit'])}.{told}"
        )
    if run := found.get("free_run"):
        yield (
            f"Left to itself, the package wrote {run['num_rows']} texts of {run['num_tokens']} tokens, "
            + (
                "each token as the torch twin did."
                if not run["num_diverged"]
                else f"as the torch twin did for {run['mean_prefix']:.1f} tokens in the mean and "
                f"{run['shortest_prefix']} in the shortest; "
                f"{run['num_diverged']} parted from it, over a gap of {format_error(run['largest_gap'])} of the "
                "largest logit at most."
            )
        )
    if isinstance(forced := found.get("forced"), dict):
        yield (
            f"With the {model} model's routing forced on it the twin is {format_error(forced['kl'])} nats from it, "
            "with its own "
            f"{format_error(forced['kl_free'])}: the difference is what other experts cost."
        )
    finetuned = found["finetuned"]
    if finetuned.get("flipped_share") == 0:
        yield f"Every token went to the experts that the {model} model chooses, in all layers."
    elif None not in (finetuned.get("flipped_share"), finetuned.get("kl_flipped"), finetuned.get("kl_unflipped")):
        yield (
            f"Of the tokens {format_share(finetuned['flipped_share'])} went to other experts than the {model} "
            "model's in some layer; there the KL "
            f"is {format_error(finetuned['kl_flipped'])} nats, elsewhere {format_error(finetuned['kl_unflipped'])}."
        )
    if "num_fallback_nodes" in found:
        count = found["num_fallback_nodes"]
        yield (
            f"{count} nodes were placed on another provider than asked for."
            if count
            else "No node was placed on another provider."
        )


def _provider_tables(found: dict[str, Any], model: str) -> Iterator[tuple[str | None, Grid]]:
    yield (
        None,
        _records(
            [{name: value for name, value in check.items() if name not in _TOLD_BY_NAME} for check in found["checks"]]
        ),
    )
    if any(isinstance(task, dict) for task in found.get("tasks", ())):
        yield "Tasks", _task_table([task for task in found["tasks"] if isinstance(task, dict)], model)
    if isinstance(places := found.get("places"), list) and places:
        yield "Places inside the graph, each on its own input: the worst layer of each", _places(places)
    if limits := found.get("limits"):
        rows = tuple(
            (_words(name), format_error(limit["value"]), str(limit["origin"])) for name, limit in limits.items()
        )
        yield "Where the limits come from", Grid(("limit", "value", "origin"), rows)


def _share_of_limit(place: dict[str, Any]) -> float:
    return float(place["error"] / place["limit"]) if place["limit"] else math.inf


def _places(places: Sequence[dict[str, Any]]) -> Grid:
    """A row for each kind of place, with its worst layer."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for place in places:
        kinds.setdefault(place["part"], []).append(place)
    rows = []
    for part, found in kinds.items():
        worst = max(found, key=_share_of_limit)
        layer = NONE if worst["layer"] < 0 else str(worst["layer"])
        noise = NONE if worst["noise"] is None else format_error(worst["noise"])
        flips = sum(place["num_flips"] for place in found)
        rows.append(
            (
                part,
                layer,
                format_error(worst["error"]),
                format_error(worst["limit"]),
                noise,
                f"{worst['num_tokens']:,}",
                f"{flips:,}",
            )
        )
    return Grid(("place", "worst layer", "relative error", "limit", "noise of float32", "tokens", "flips"), tuple(rows))


def _task_table(tasks: Sequence[dict[str, Any]], model: str) -> Grid:
    """A row for each score of each task; the first of a task is the one that is judged."""
    headers = ("task", "examples", "score", model, "twin", "package", "change", f"same as {model}", "same as twin")
    rows = []
    for task in tasks:
        for metric in (task["metric"], *sorted(set(task["package"]) - {task["metric"]})):
            scores = (format_score(task[model][metric]) for model in ("finetuned", "twin", "package"))
            if metric != task["metric"]:
                rows.append(("", "", metric, *scores, "", "", ""))
                continue
            change = format_difference(task["change"], task["standard_error"])
            same = (format_agreement(task[key]) for key in ("same_as_finetuned", "same_as_twin"))
            rows.append((task["name"], f"{task['num_examples']:,}", metric, *scores, change, *same))
    return Grid(headers, tuple(rows))


def _agreements(found: dict[str, Any], model: str) -> Grid:
    columns: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("max error", lambda a: format_error(a["max_error"])),
        ("mean error", lambda a: format_error(a["mean_error"])),
        ("KL, nats", lambda a: format_error(a["kl"])),
        ("top-1 agreement", lambda a: format_agreement(a["top1_agreement"])),
        ("top-5 agreement", lambda a: format_agreement(a.get("top5_agreement"))),
        ("worst routing", lambda a: format_agreement(min(a["routing_agreement"], default=None))),
        ("worst hidden error", lambda a: format_error(max(a["hidden_error"])) if a["hidden_error"] else NONE),
    )
    compared = ((found["twin"], "torch twin, same weights"), (found["finetuned"], f"{model} torch model, float32"))
    told = [
        column
        for column in columns
        if column[0] != "top-5 agreement" or any("top5_agreement" in a for a, _ in compared)
    ]
    rows = tuple((name, *(text(agreement) for _, text in told)) for agreement, name in compared)
    return Grid(("against", *(header for header, _ in told)), rows)


def build_table(facts: dict[str, Any]) -> Grid:
    """How each variant was quantized and exported: a row for each fact, a column for each variant.

    Timings and searches have places of their own.
    """
    elsewhere = ("timings", "search")
    columns = {}
    for name, variant in facts["variants"].items():
        built = {
            stage: {key: value for key, value in variant[stage].items() if key not in elsewhere}
            for stage in ("quantize", "onnx")
        }
        columns[name] = dict(_pairs(built))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return Grid(
        ("fact", *columns), tuple((name, *(column.get(name, NONE) for column in columns.values())) for name in names)
    )


def timing_table(facts: dict[str, Any]) -> Grid:
    """The lowerings that were timed to choose one, of each variant the fastest first."""
    headers = ("Variant", "Experts written as", "Prefill tokens/s", "Decode tokens/s", "Request, ms")
    rows = (
        (
            name,
            time["lowering"],
            format_rounded(time["prefill_tokens_per_second"]),
            format_rounded(time["decode_tokens_per_second"]),
            f"{1000 * time['request_seconds']:.1f}",
        )
        for name, variant in facts["variants"].items()
        for time in variant["onnx"]["timings"]
    )
    return Grid(headers, tuple(rows))


def provenance_sections(facts: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every fact that is shown nowhere else, by the stage that found it."""
    shown = {"finetune": ("domains", "evaluations", "history", "warnings"), "upcycle": ("receipt", "receipt_notes")}
    elsewhere = {"name", "recipe", "variants", "costs"}
    sections = {key: value for key, value in facts.items() if key not in elsewhere}
    yield "run", [pair for key, value in sections.items() if not isinstance(value, dict) for pair in _pairs(value, key)]
    for key, value in sections.items():
        if isinstance(value, dict):
            yield key, list(_pairs({k: v for k, v in value.items() if k not in shown.get(key, ())}))
