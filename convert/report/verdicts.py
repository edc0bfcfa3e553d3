"""Verdicts: what the numbers say, in plain sentences chosen by the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dense2moe.convert.report.facts import ReportFacts, VariantFacts
from dense2moe.convert.report.figures import describe_change, figures_agree, format_figure, format_improvement
from dense2moe.convert.report.merging_tables import judge_soup
from dense2moe.convert.report.numerals import (
    format_count,
    format_difference,
    format_operations,
    format_rounded,
    format_score,
    format_seconds,
    format_share,
)
from dense2moe.convert.report.remedies import describe_failure
from dense2moe.convert.report.summary import Verdict
from dense2moe.convert.report.worth import judge_worth
from dense2moe.export.parity.records import ProviderParity, TaskCheck
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.training.facts import FinetuneFacts
from dense2moe.upcycle.training.history import ModelName

_SLACK = 0.1  # share by which a control's compute may differ from the mixture's in the favour of the better one
_LEAST_ERROR = 1e-4
"""Of a figure: a relative standard error below it is nothing that anyone reads."""


@dataclass(frozen=True)
class Training:
    """What one trained model reached, and what it took.

    The loss in nats a token on held-out text, the active parameters those of one token.
    """

    name: str
    loss: float
    figure: Figure
    num_active_parameters: int
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    num_steps: int
    seconds: float
    flops: float


def verdict_lines(facts: ReportFacts) -> list[str]:
    """What the numbers say, in plain sentences: upcycling, fine-tuning, and each variant."""
    return [verdict.text for verdict in judge(facts)]


def judge(facts: ReportFacts) -> Iterator[Verdict]:
    """What the numbers say: worth, upcycling, fine-tuning, each variant."""
    yield from judge_worth(facts)
    yield _merging_verdict(facts) if facts.upcycle.experts else _upcycling_verdict(facts)
    yield from judge_soup(facts.upcycle)
    yield from (Verdict(f"{warning}.", None) for found in facts.branches.values() for warning in found.warnings)
    yield from _finetuning_verdicts(facts)
    if "dense continued" in facts.finetune.evaluations:
        yield _cost_verdict(facts)
    yield from _visit_verdicts(facts)
    reference = facts.variants["float32"].parity.measured if "float32" in facts.variants else None
    for name, variant in facts.variants.items():
        yield _variant_verdict(name, variant, reference, facts.exported)
        yield from (Verdict(f"ONNX {name}: {warning}.", None) for warning in variant.quantize.warnings)
    if not facts.variants:
        yield Verdict("No ONNX variant was asked for, so nothing was exported and no parity was checked.", None)


def _merging_verdict(facts: ReportFacts) -> Verdict:
    """Merging alone, before any training; it changes the function by design."""
    dense, merged = facts.figure("dense"), facts.figure("upcycled")
    names = ", ".join(distance.name for distance in facts.upcycle.distances)
    return Verdict(
        f"Merging {names} (all but their experts by '{facts.upcycle.merging}') gave a {dense.name} of "
        f"{format_figure(merged, 5)} before any training; the dense model has {format_figure(dense, 5)}.",
        None,
    )


def _upcycling_verdict(facts: ReportFacts) -> Verdict:
    dense, upcycled = facts.figure("dense"), facts.figure("upcycled")
    if (same := facts.finetune.evaluations["upcycled"].same) is not None:
        differ = f"differ by {same.difference:.0e} nats a token at most" if same.difference else "are equal"
        return Verdict(
            f"Upcycling kept the {dense.name}, {format_figure(dense, 5)}: the receipt shows that the mixture computes "
            f"what the dense model does, and the losses of {same.num_blocks} held-out blocks, read by both, {differ}; "
            "so the other blocks were read by the dense model alone.",
            True,
        )
    figures = f"{format_figure(dense, 5)} dense, {format_figure(upcycled, 5)} upcycled"
    if figures_agree(dense, upcycled, 4):
        return Verdict(f"Upcycling kept the {dense.name} to 4 digits: {figures}, before any training.", True)
    return Verdict(f"Upcycling did NOT keep the {dense.name} to 4 digits: {figures}, before any training.", False)


def _finetuning_verdicts(facts: ReportFacts) -> Iterator[Verdict]:
    finetune = facts.finetune
    if "fine-tuned" not in finetune.evaluations:
        yield Verdict(
            "Fine-tuning was switched off: the ONNX variants are made from the upcycled model, and compared with it.",
            None,
        )
        return
    tuned = facts.figure("fine-tuned")
    if finetune.best_steps.get("fine-tuned") == 0:
        yield Verdict(
            f"Fine-tuning did not help: no evaluation had a {tuned.better} {tuned.name} on the validation split than "
            "the start, so the start's weights were kept.",
            False,
        )
    if "dense continued" not in finetune.evaluations:
        yield Verdict(
            f"Fine-tuning took the {tuned.name} from {format_figure(facts.figure('dense'))} to {format_figure(tuned)}; "
            "without a dense control (finetune.control) the report cannot say whether the mixture helped or the "
            "tokens did.",
            None,
        )
        return
    if facts.branches:
        yield _branches_verdict(facts)
    yield _control_verdict(tuned, facts.figure("dense continued"), "continued on the same tokens")
    if "dense, same FLOPs" in finetune.evaluations:
        found = _control_verdict(tuned, facts.figure("dense, same FLOPs"), "trained with the same compute")
        yield _weigh_compute(found, finetune)


def _branches_verdict(facts: ReportFacts) -> Verdict:
    """What branches took, which the controls were given as well."""
    spent = facts.finetune.spent
    return Verdict(
        f"Before the mixture {len(facts.branches)} branches were trained, {spent.num_tokens:,} tokens and "
        f"{format_operations(spent.flops)} in all: both dense controls were given as much beside the mixture's own.",
        None,
    )


def _control_verdict(tuned: Figure, control: Figure, training: str) -> Verdict:
    """Whether the mixture beats a dense model trained as `training` says."""
    figures = f"{format_figure(tuned)} against {format_figure(control)}"
    wins = tuned.gain(control.value) > 0
    if wins and figures_agree(tuned, control, 4):
        return Verdict(
            f"NOT {tuned.better} by more than rounding: the fine-tuned mixture and the dense model {training} agree "
            f"to 4 digits; {tuned.name} {figures}.",
            None,
        )
    if wins:
        return Verdict(
            f"The fine-tuned mixture beats the dense model {training}: {tuned.name} "
            f"{format_improvement(tuned, control)}, {figures}.",
            True,
        )
    return Verdict(
        f"NOT {tuned.better}: the fine-tuned mixture does not beat the dense model {training}; {tuned.name} "
        f"{figures}, {describe_change(tuned, control)} the control's.",
        False,
    )


def _weigh_compute(found: Verdict, finetune: FinetuneFacts) -> Verdict:
    """A verdict on equal compute, with operations and seconds of both.

    It decides nothing where the winner had much more compute.
    """
    names: tuple[ModelName, ModelName] = ("fine-tuned", "dense, same FLOPs")
    mixture, control = (
        f"{format_operations(finetune.flops[name])} ({finetune.num_steps[name]:,} steps, "
        f"{format_seconds(finetune.seconds[name])})"
        for name in names
    )
    tuned, other = finetune.flops["fine-tuned"], finetune.flops["dense, same FLOPs"]
    favoured = found.good is not None and (other < (1 - _SLACK) * tuned if found.good else other > (1 + _SLACK) * tuned)
    ending = ": too unequal to count." if favoured else "."
    return Verdict(
        f"{found.text} The control had {control}, the mixture {mixture}{ending}", None if favoured else found.good
    )


def _visit_verdicts(facts: ReportFacts) -> Iterator[Verdict]:
    """How many experts a token visited, where tokens differ."""
    visits, most = facts.finetune.visits, facts.upcycle.num_experts_per_tok
    if visits and min(visits) < most:
        mean, least, largest = (f"{value:.2f}" for value in (sum(visits) / len(visits), min(visits), max(visits)))
        yield Verdict(
            f"By its gate a token visited {mean} experts on average at the end of training ({least} to {largest} by "
            f"layer), {most} at most.",
            None,
        )


def _cost_verdict(facts: ReportFacts) -> Verdict:
    mixture, dense = (row for row in compare_training(facts) if row.name in ("fine-tuned", "dense continued"))
    does, speed, other = "decodes", mixture.decode_tokens_per_second, dense.decode_tokens_per_second
    if speed is None:
        does, speed, other = "reads", mixture.prefill_tokens_per_second, dense.prefill_tokens_per_second
    return Verdict(
        f"What the experts cost: {mixture.num_active_parameters / dense.num_active_parameters:.2f} × the dense "
        "model's parameters are active for a "
        f"token ({format_count(mixture.num_active_parameters)} against {format_count(dense.num_active_parameters)}), "
        f"it {does} {format_rounded(speed)} tokens/s against {format_rounded(other)}, and trained for "
        f"{format_seconds(mixture.seconds)} against {format_seconds(dense.seconds)} on the same tokens.",
        None,
    )


def compare_training(facts: ReportFacts) -> list[Training]:
    """The fine-tuned mixture and the dense controls that were trained."""
    finetune = facts.finetune
    names: tuple[ModelName, ...] = ("fine-tuned", "dense continued", "dense, same FLOPs")
    return [
        Training(
            name,
            found.loss,
            found.figures[0],
            facts.upcycle.num_active_parameters if name == "fine-tuned" else found.num_parameters,
            found.decode_tokens_per_second,
            found.prefill_tokens_per_second,
            finetune.num_steps[name],
            finetune.seconds[name],
            finetune.flops[name],
        )
        for name in names
        if (found := finetune.evaluations.get(name)) is not None
    ]


def _variant_verdict(name: str, variant: VariantFacts, reference: ProviderParity | None, model: str) -> Verdict:
    measured, parity = variant.parity.measured, variant.parity
    told = ["its quality was not measured"] if measured is None else _describe_quality(name, measured, reference, model)
    if parity.passed:
        return Verdict(f"ONNX {name}: {'; '.join(told)}; parity passed.", True)
    return Verdict(f"ONNX {name}: {'; '.join(told)}; {describe_failure(name, parity)}", False)


def _describe_quality(name: str, measured: ProviderParity, reference: ProviderParity | None, model: str) -> list[str]:
    figure = measured.figures[0]
    alone = reference is None or name == "float32"
    other = measured.finetuned_figures[0] if reference is None or alone else reference.figures[0]
    whose = f"the {model} torch model's" if alone else "ONNX float32's"
    text = f"{figure.name} {format_figure(figure)}, {describe_change(figure, other)} {whose}"
    if measured.figures_error >= _LEAST_ERROR:
        text += f" (± {format_share(measured.figures_error)} on {measured.num_language_tokens:,} tokens)"
    return [text, *(describe_task(task, model) for task in measured.tasks if isinstance(task, TaskCheck))]


def describe_task(task: TaskCheck, model: str = "fine-tuned") -> str:
    """A task in half a sentence.

    What the package scores, how far that is from the `model` that it was made from, and how sure.
    """
    change = f"{format_difference(task.change, task.standard_error)} beside" if task.change else "as"
    return f"{task.name}: {task.metric} {format_score(task.package[task.metric])}, {change} the {model} model's"
