"""Tables of training, receipt, builds, timings and provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.figures import figure_title, format_figure
from dense2moe.convert.report.grid import Grid, list_facts, shallow
from dense2moe.convert.report.numerals import (
    NONE,
    format_count,
    format_error,
    format_operations,
    format_rounded,
    format_seconds,
    format_special,
)
from dense2moe.convert.report.verdicts import compare_training
from dense2moe.upcycle.building.facts import ReceiptLine

_FEW = 12  # rows of a receipt that are shown whole
_DIGITS = re.compile(r"\d+")


def trained_table(facts: ReportFacts) -> Grid:
    """What the mixture and the dense controls reached, and at what cost."""
    rows = compare_training(facts)
    decodes = any(row.decode_tokens_per_second is not None for row in rows)
    headers = (
        "Trained",
        "Loss, nats",
        figure_title(facts.figure("dense")),
        "Active parameters",
        "Decode tokens/s" if decodes else "Prefill tokens/s",
        "Operations",
        "Training time",
        "Steps",
    )
    return Grid(
        headers,
        tuple(
            (
                row.name,
                format_special(row.loss) or f"{row.loss:.4f}",
                format_figure(row.figure),
                format_count(row.num_active_parameters),
                format_rounded(row.decode_tokens_per_second if decodes else row.prefill_tokens_per_second),
                format_operations(row.flops),
                format_seconds(row.seconds),
                f"{row.num_steps:,}",
            )
            for row in rows
        ),
    )


@dataclass(frozen=True)
class ReceiptTables:
    """The receipt by kind of comparison; and whole, where that is more.

    A row of a kind has the worst of its comparisons.
    """

    kinds: Grid
    whole: Grid | None
    num_comparisons: int


def receipt_tables(comparisons: Sequence[ReceiptLine]) -> ReceiptTables:
    """The receipt, the worst first.

    Where it has few rows, all of them: one for each router, text and experts implementation, a column for each dtype.
    Else one for all layers alike.
    """
    dtypes = tuple(dict.fromkeys(line.dtype for line in comparisons))
    rows: dict[tuple[str, str, str], dict[str, ReceiptLine]] = {}
    for line in comparisons:
        rows.setdefault((line.router, line.text, line.experts), {})[line.dtype] = line
    whole = Grid(
        ("comparison", *dtypes, "tokens"),
        tuple(
            (_name_kind(router, text, experts), *_receipt_cells(found, dtypes), _num_tokens(found.values()))
            for (router, text, experts), found in sorted(rows.items(), key=lambda row: _badness(row[1].values()))
        ),
    )
    if len(rows) <= _FEW:
        return ReceiptTables(whole, None, len(comparisons))
    kinds: dict[tuple[str, str, str], list[ReceiptLine]] = {}
    for line in comparisons:
        kinds.setdefault((line.router, _DIGITS.sub("…", line.text), line.experts), []).append(line)
    ranked = sorted(kinds.items(), key=lambda kind: _badness(kind[1]))
    grouped = Grid(
        ("comparison", *dtypes, "tokens", "comparisons of this kind", "the worst"),
        tuple(_kind_row(router, experts, lines, dtypes) for (router, _, experts), lines in ranked),
    )
    return ReceiptTables(grouped, whole, len(comparisons))


def _kind_row(router: str, experts: str, lines: Sequence[ReceiptLine], dtypes: Sequence[str]) -> tuple[str, ...]:
    """One kind of comparison: the worst in each dtype, and how many."""
    worst = {
        dtype: min((line for line in lines if line.dtype == dtype), key=lambda line: _badness([line]))
        for dtype in dict.fromkeys(line.dtype for line in lines)
    }
    place = min(worst.values(), key=lambda line: _badness([line])).text
    places = {line.text for line in lines}
    return (
        _name_kind(router, _DIGITS.sub("…", place) if len(places) > 1 else place, experts),
        *_receipt_cells(worst, dtypes),
        _num_tokens(lines),
        f"{len(lines):,}",
        place,
    )


def _name_kind(router: str, text: str, experts: str) -> str:
    """A comparison in words.

    The embedding and the head have no router and no experts.
    """
    return text if router == "no" else f"{text}; {router} router, {experts} experts"


def _num_tokens(lines: Any) -> str:
    counts = [line.num_tokens for line in lines]
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _badness(lines: Any) -> tuple[float, float]:
    """A sort key: nearest to its limit first, then the largest error."""
    shares = [line.rel / line.limit for line in lines if line.limit]
    return -max(shares, default=0.0), -max((line.rel for line in lines), default=0.0)


def _receipt_cells(found: dict[str, ReceiptLine], dtypes: Sequence[str]) -> tuple[str, ...]:
    return tuple(_receipt_cell(found[dtype]) if dtype in found else NONE for dtype in dtypes)


def _receipt_cell(line: ReceiptLine) -> str:
    if line.bitwise:
        return "bitwise equal"
    error = format_error(line.rel)
    return f"{error}; bitwise with rounded halves" if line.halves_bitwise else error


def build_table(facts: ReportFacts) -> Grid:
    """How each variant was quantized and exported, a row a fact.

    Timings and searches have places of their own.
    """
    columns = {
        name: dict(
            list_facts(
                {
                    "quantize": _without(variant.quantize, "search"),
                    "onnx": _without(variant.onnx, "timings"),
                }
            )
        )
        for name, variant in facts.variants.items()
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return Grid(
        ("fact", *columns), tuple((name, *(column.get(name, NONE) for column in columns.values())) for name in names)
    )


def timing_table(facts: ReportFacts) -> Grid:
    """The timed lowerings of each variant, the fastest first."""
    headers = ("Variant", "Experts written as", "Prefill tokens/s", "Decode tokens/s", "Request, ms")
    rows = (
        (
            name,
            time.lowering,
            format_rounded(time.prefill_tokens_per_second),
            format_rounded(time.decode_tokens_per_second),
            f"{1000 * time.request_seconds:.1f}",
        )
        for name, variant in facts.variants.items()
        for time in variant.onnx.timings
    )
    return Grid(headers, tuple(rows))


def provenance_sections(facts: ReportFacts) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Facts shown nowhere else, by the stage that found them."""
    shown = {
        "finetune": ("domains", "evaluations", "history", "labels", "oracle", "warnings"),
        "upcycle": ("receipt", "receipt_notes"),
    }
    found = _without(facts, "name", "recipe", "variants", "costs", "branches")
    nested = {name: value for name, value in found.items() if is_dataclass(value) or isinstance(value, dict)}
    yield "run", [pair for name, value in found.items() if name not in nested for pair in list_facts(value, name)]
    for name, value in nested.items():
        parts = _without(value, *shown.get(name, ())) if is_dataclass(value) else value
        if name == "data":
            parts |= parts.pop("details")
        yield name, list(list_facts(parts))


def _without(record: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in shallow(record).items() if name not in names}
