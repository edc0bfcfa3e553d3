"""The summary: a row for each model, and what the numbers say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from dense2moe.convert.report.numerals import (
    NONE,
    agree,
    describe_change,
    format_agreement,
    format_count,
    format_difference,
    format_perplexity,
    format_rounded,
    format_score,
    format_seconds,
    format_share,
    format_size,
)

TORCH_MODELS = ("dense", "upcycled", "dense continued", "dense, equal time", "fine-tuned")
COLUMNS = (
    "Model",
    "Perplexity",
    "Size",
    "Top-1 agreement",
    "Routing agreement",
    "Decode tokens/s",
    "Prefill tokens/s",
    "Parity",
)
_TIME_SLACK = 0.1  # share by which a control's seconds may differ from the mixture's in the favour of the better one
_LEAST_ERROR = 1e-4
"""Of a perplexity: a standard error below it is no figure that anyone reads."""


@dataclass(frozen=True)
class Row:
    """One model in the summary.

    Agreement is with the torch model that was exported, routing agreement that of the worst layer, both shares.
    """

    name: str
    perplexity: float | None
    size_bytes: int
    top1_agreement: float | None
    routing_agreement: float | None
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    passed: bool | None


@dataclass(frozen=True)
class Training:
    """What one trained model reached, and what it took.

    The loss in nats a token on held-out text, the active parameters those of one token.
    """

    name: str
    loss: float
    perplexity: float
    num_active_parameters: int
    decode_tokens_per_second: float
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """One finding in a sentence: good, bad, or neither."""

    text: str
    good: bool | None


def exported_model(facts: dict[str, Any]) -> str:
    """What the torch model is called that the ONNX variants were made from.

    'fine-tuned', or 'upcycled' where fine-tuning was switched off.
    """
    return "fine-tuned" if "fine-tuned" in facts["finetune"]["evaluations"] else "upcycled"


def summarize(facts: dict[str, Any]) -> list[Row]:
    """One row for each torch model and each ONNX variant, in the order in which they came to be.

    A variant's figures are those of the CPU, which parity always runs on, or else of the first provider that ran.
    """
    evaluations = facts["finetune"]["evaluations"]
    rows = []
    for name in TORCH_MODELS:
        if name in evaluations:
            e = evaluations[name]
            rows.append(
                Row(name, e["perplexity"], e["weight_bytes"], None, None, e["decode_tokens_per_second"], None, None)
            )
    for name, variant in facts["variants"].items():
        measured, size, passed = find_measured(variant), variant["onnx"]["package_bytes"], variant["parity"]["passed"]
        if measured is None:
            rows.append(Row(f"ONNX {name}", None, size, None, None, None, None, passed))
            continue
        agreement = measured["finetuned"]
        routing, decode = min(agreement["routing_agreement"], default=None), measured["decode_tokens_per_second"]
        prefill, perplexity = measured["prefill_tokens_per_second"], measured["perplexity"]
        rows.append(
            Row(f"ONNX {name}", perplexity, size, agreement["top1_agreement"], routing, decode, prefill, passed)
        )
    return rows


def summary_table(facts: dict[str, Any]) -> Table:
    """The summary for the terminal; fits in 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(COLUMNS):
        justify: Literal["left", "right"] = "left" if number in (0, len(COLUMNS) - 1) else "right"
        table.add_column(header.replace(" ", "\n"), justify=justify, vertical="bottom", no_wrap=True)
    rows = summarize(facts)
    for number, row in enumerate(rows):
        *cells, parity = (Text(cell) for cell in row_cells(row))
        parity.stylize({True: "green", False: "bold red", None: "dim"}[row.passed])
        following = rows[number + 1] if number + 1 < len(rows) else row
        table.add_row(*cells, parity, end_section=row.passed is None and following.passed is not None)
    return table


def verdict_lines(facts: dict[str, Any]) -> list[str]:
    """What the numbers say, in plain sentences: upcycling, fine-tuning, and each variant."""
    return [verdict.text for verdict in judge(facts)]


def judge(facts: dict[str, Any]) -> Iterator[Verdict]:
    """What the numbers say, in order: upcycling, fine-tuning, each variant."""
    evaluations = facts["finetune"]["evaluations"]
    yield _upcycling_verdict(evaluations["dense"]["perplexity"], evaluations["upcycled"]["perplexity"])
    yield from _finetuning_verdicts(facts["finetune"])
    if "dense continued" in evaluations:
        yield _cost_verdict(facts)
    variants = facts["variants"]
    reference = find_measured(variants["float32"]) if "float32" in variants else None
    for name, variant in variants.items():
        yield _variant_verdict(name, variant, reference, exported_model(facts))
        yield from (Verdict(f"ONNX {name}: {warning}.", None) for warning in variant["quantize"].get("warnings", ()))
    if not variants:
        yield Verdict("No ONNX variant was asked for, so nothing was exported and no parity was checked.", None)


def _upcycling_verdict(dense: float, upcycled: float) -> Verdict:
    figures = f"{format_perplexity(dense, 5)} dense, {format_perplexity(upcycled, 5)} upcycled"
    if agree(dense, upcycled, 4):
        return Verdict(f"Upcycling kept the perplexity to 4 digits: {figures}, before any training.", True)
    return Verdict(f"Upcycling did NOT keep the perplexity to 4 digits: {figures}, before any training.", False)


def _finetuning_verdicts(finetune: dict[str, Any]) -> Iterator[Verdict]:
    evaluations = finetune["evaluations"]
    if "fine-tuned" not in evaluations:
        yield Verdict(
            "Fine-tuning was switched off: the ONNX variants are those of the upcycled model, which is also what "
            "they are compared with.",
            None,
        )
        return
    tuned = evaluations["fine-tuned"]["perplexity"]
    if finetune["best_steps"].get("fine-tuned") == 0:
        yield Verdict(
            "Fine-tuning helped nothing: no look at the validation split was better than the start, whose weights "
            "were kept.",
            False,
        )
    if "dense continued" not in evaluations:
        dense = evaluations["dense"]["perplexity"]
        yield Verdict(
            f"Fine-tuning took the perplexity from {format_perplexity(dense)} to {format_perplexity(tuned)}; "
            "without a dense control (finetune.control) the report cannot say whether the mixture helped or the "
            "tokens did.",
            None,
        )
        return
    yield _control_verdict(tuned, evaluations["dense continued"]["perplexity"], "continued on the same tokens")
    if "dense, equal time" in evaluations:
        found = _control_verdict(tuned, evaluations["dense, equal time"]["perplexity"], "trained for as long")
        # an older run knows the clock's alone
        spent = "compute_seconds" if finetune.get("compute_seconds") else "seconds"
        seconds, steps = (
            {name: finetune[key][name] for name in ("fine-tuned", "dense, equal time")} for key in (spent, "num_steps")
        )
        mixture, control = (f"{format_seconds(seconds[name])} ({steps[name]:,} steps)" for name in seconds)
        ratio = seconds["dense, equal time"] / seconds["fine-tuned"]
        favoured = found.good is not None and (ratio < 1 - _TIME_SLACK if found.good else ratio > 1 + _TIME_SLACK)
        what = " of computing" if spent == "compute_seconds" else ""
        times = f"The control had {control}, the mixture {mixture}{what}" + (
            ": too unequal to count." if favoured else "."
        )
        yield Verdict(f"{found.text} {times}", None if favoured else found.good)


def _control_verdict(tuned: float, control: float, training: str) -> Verdict:
    """Whether the mixture beats a dense model that was trained as `training` says, by their perplexities."""
    figures = f"{format_perplexity(tuned)} against {format_perplexity(control)}"
    if tuned < control and agree(tuned, control, 4):
        return Verdict(
            f"NOT lower by more than rounding: the fine-tuned mixture and the dense model {training} agree to 4 "
            f"digits; perplexity {figures}.",
            None,
        )
    if tuned < control:
        return Verdict(
            f"The fine-tuned mixture beats the dense model {training}: perplexity lower by "
            f"{format_share(1 - tuned / control)}, {figures}.",
            True,
        )
    return Verdict(
        f"NOT lower: the fine-tuned mixture does not beat the dense model {training}; perplexity {figures}, "
        f"{describe_change(tuned, control)} the control's.",
        False,
    )


def _cost_verdict(facts: dict[str, Any]) -> Verdict:
    mixture, dense = (row for row in compare_training(facts) if row.name in ("fine-tuned", "dense continued"))
    return Verdict(
        f"What the experts cost: {mixture.num_active_parameters / dense.num_active_parameters:.2f} × the dense "
        "model's parameters are active for a "
        f"token ({format_count(mixture.num_active_parameters)} against {format_count(dense.num_active_parameters)}), "
        "it decodes "
        f"{format_rounded(mixture.decode_tokens_per_second)} tokens/s against "
        f"{format_rounded(dense.decode_tokens_per_second)}, and trained for "
        f"{format_seconds(mixture.seconds)} against {format_seconds(dense.seconds)} on the same tokens.",
        None,
    )


def compare_training(facts: dict[str, Any]) -> list[Training]:
    """The fine-tuned mixture and the dense models that it is to be compared with, those that were trained."""
    finetune = facts["finetune"]
    found = []
    for name in ("fine-tuned", "dense continued", "dense, equal time"):
        if name in finetune["evaluations"]:
            e = finetune["evaluations"][name]
            active = facts["upcycle"]["num_active_parameters"] if name == "fine-tuned" else e["num_parameters"]
            speed, steps, seconds = (
                e["decode_tokens_per_second"],
                finetune["num_steps"][name],
                finetune["seconds"][name],
            )
            found.append(Training(name, e["loss"], e["perplexity"], active, speed, steps, seconds))
    return found


def describe_task(task: dict[str, Any], model: str = "fine-tuned") -> str:
    """A task in half a sentence.

    What the package scores, how far that is from the `model` that it was made from, and how sure.
    """
    change = f"{format_difference(task['change'], task['standard_error'])} beside" if task["change"] else "as"
    return (
        f"{task['name']}: {task['metric']} {format_score(task['package'][task['metric']])}, {change} the {model} "
        "model's"
    )


def _variant_verdict(name: str, variant: dict[str, Any], reference: dict[str, Any] | None, model: str) -> Verdict:
    measured, parity = find_measured(variant), variant["parity"]
    if measured is None:
        text = "perplexity not measured"
    elif reference is None or name == "float32":
        change = describe_change(measured["perplexity"], measured["finetuned_perplexity"])
        text = f"perplexity {format_perplexity(measured['perplexity'])}, {change} the {model} torch model's"
    else:
        change = describe_change(measured["perplexity"], reference["perplexity"])
        text = f"perplexity {format_perplexity(measured['perplexity'])}, {change} float32 ONNX's"
    if measured is not None and measured.get("perplexity_error", 0.0) >= _LEAST_ERROR:
        text += f" (± {format_share(measured['perplexity_error'])} on {measured['num_language_tokens']:,} tokens)"
    tasks = () if measured is None else measured.get("tasks", ())
    text = "; ".join([text, *(describe_task(task, model) for task in tasks if isinstance(task, dict))])
    if parity["passed"]:
        return Verdict(f"ONNX {name}: {text}; parity passed.", True)
    return Verdict(f"ONNX {name}: {text}; parity FAILED: {'; '.join(parity['breaches']) or 'no reason given'}.", False)


def find_measured(variant: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the CPU provider, or of the first that ran; a provider that did not run is a sentence."""
    ran = {name: found for name, found in variant["parity"]["providers"].items() if isinstance(found, dict)}
    return ran.get("CPUExecutionProvider") or next(iter(ran.values()), None)


def row_cells(row: Row) -> tuple[str, ...]:
    """A row as the texts of `COLUMNS`."""
    return (
        row.name,
        format_perplexity(row.perplexity),
        format_size(row.size_bytes),
        format_agreement(row.top1_agreement),
        format_agreement(row.routing_agreement),
        format_rounded(row.decode_tokens_per_second),
        format_rounded(row.prefill_tokens_per_second),
        {True: "passed", False: "FAILED", None: NONE}[row.passed],
    )
