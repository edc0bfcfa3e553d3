"""The summary: a row a model, for page, card and terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from dense2moe.convert.report.facts import ReportFacts, VariantFacts
from dense2moe.convert.report.figures import figure_title, format_figure
from dense2moe.convert.report.numerals import NONE, format_agreement, format_rounded, format_size
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.training.history import ModelName

TORCH_MODELS: tuple[ModelName, ...] = ("dense", "upcycled", "dense continued", "dense, same FLOPs", "fine-tuned")
PASSED, FAILED = "passed", "FAILED"
_WIDE = 92  # columns from which the summary has two between its own


@dataclass(frozen=True)
class Row:
    """One model in the summary.

    The figure that models are judged by, on held-out data. Agreement is with the torch model that was exported, routing
    agreement that of the worst layer, both shares.
    """

    name: str
    figure: Figure | None
    size_bytes: int
    top1_agreement: float | None
    routing_agreement: float | None
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    passed: bool | None


@dataclass(frozen=True)
class Verdict:
    """One finding in a sentence: good, bad, or neither."""

    text: str
    good: bool | None


def summarize(facts: ReportFacts) -> list[Row]:
    """A row for each torch model and ONNX variant, oldest first.

    A variant's figures are those of the CPU, which parity always runs on, or else of the first provider that ran.
    """
    evaluations = facts.finetune.evaluations
    torch_rows = [
        Row(
            name,
            facts.figure(name),
            evaluations[name].weight_bytes,
            None,
            None,
            evaluations[name].decode_tokens_per_second,
            evaluations[name].prefill_tokens_per_second,
            None,
        )
        for name in TORCH_MODELS
        if name in evaluations
    ]
    return torch_rows + [_variant_row(name, variant) for name, variant in facts.variants.items()]


def _variant_row(name: str, variant: VariantFacts) -> Row:
    measured, size, passed = variant.parity.measured, variant.onnx.package_bytes, variant.parity.passed
    if measured is None:
        return Row(f"ONNX {name}", None, size, None, None, None, None, passed)
    agreement = measured.finetuned
    return Row(
        f"ONNX {name}",
        measured.figures[0],
        size,
        agreement.top1_agreement,
        min(agreement.routing_agreement, default=None),
        measured.decode_tokens_per_second,
        measured.prefill_tokens_per_second,
        passed,
    )


def summary_columns(facts: ReportFacts) -> tuple[str, ...]:
    """The headings of the summary."""
    return (
        "Model",
        "Parity",
        figure_title(facts.figure("dense")),
        "Size",
        "Top-1 agreement",
        "Routing agreement",
        "Decode tokens/s",
        "Prefill tokens/s",
    )


def row_cells(row: Row) -> tuple[str, ...]:
    """A row as the texts of `summary_columns`."""
    return (
        row.name,
        {True: PASSED, False: FAILED, None: NONE}[row.passed],
        format_figure(row.figure),
        format_size(row.size_bytes),
        format_agreement(row.top1_agreement),
        format_agreement(row.routing_agreement),
        format_rounded(row.decode_tokens_per_second),
        format_rounded(row.prefill_tokens_per_second),
    )


_MEANINGS: dict[ModelName, str] = {
    "dense": "the source model",
    "upcycled": "the mixture made from it, before any training",
    "dense continued": "the source model trained on the same tokens as the mixture",
    "dense, same FLOPs": "the source model trained with as many operations as the mixture",
    "fine-tuned": "the mixture after training",
}


def describe_models(facts: ReportFacts) -> str:
    """What the models of the summary are, in one sentence."""
    told = [f"“{name}” is {_MEANINGS[name]}" for name in TORCH_MODELS if name in facts.finetune.evaluations]
    return f"{'; '.join(told)}."


def summary_table(facts: ReportFacts, width: int) -> Table:
    """The summary for a terminal of `width` columns; 80 are enough.

    In fewer, cells are folded, never cut.
    """
    wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, int(wide), 0, 0), pad_edge=False, show_edge=False)
    for number, header in enumerate(summary_columns(facts)):
        heading = (header if wide else header.replace("agreement", "agrees")).replace(" ", "\n")
        justify: Literal["left", "right"] = "left" if number < 2 else "right"
        table.add_column(heading, justify=justify, vertical="bottom", overflow="fold")
    rows = summarize(facts)
    for number, row in enumerate(rows):
        name, parity, *cells = (Text(cell) for cell in row_cells(row))
        parity.stylize({True: "green", False: "bold red", None: "dim"}[row.passed])
        following = rows[number + 1] if number + 1 < len(rows) else row
        table.add_row(name, parity, *cells, end_section=row.passed is None and following.passed is not None)
    return table
