"""Tables and sentences of parity: tiers, variants, execution providers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dense2moe.convert.report.facts import ReportFacts, VariantFacts
from dense2moe.convert.report.figures import format_figure
from dense2moe.convert.report.grid import Grid, column_title, tabulate
from dense2moe.convert.report.numerals import (
    NONE,
    format_agreement,
    format_difference,
    format_error,
    format_rounded,
    format_score,
    format_share,
)
from dense2moe.convert.report.summary import FAILED
from dense2moe.export.parity.records import (
    TIERS,
    Agreement,
    Forced,
    FreeRun,
    PlaceCheck,
    ProviderParity,
    TaskCheck,
    Tier,
    WeightsCheck,
)

_QUESTIONS: dict[Tier, str] = {
    "weights": "Does the file hold the twin's weights, row by row?",
    "operator": "Do router and experts of each layer compute what the twin's do, given the same input?",
    "layer": "Does every other part, from embedding to head, compute what the twin's does, given the same input?",
    "logits": "Are the outputs the same however the tokens are fed: at once, padded, one by one?",
    "language": "Does it predict text as well as the torch model?",
    "task": "Does it do its tasks as well as the torch model?",
    "routing": "Does every token visit the same experts?",
    "files": "Do tokenizer and settings say what the checkpoint's say?",
}
_PLAIN = 1e-3
"""From here on a limit is written without an exponent."""

Titled = tuple[str | None, Grid]


@dataclass(frozen=True)
class ProviderSection:
    """One execution provider: a note, remarks, tables with their titles."""

    name: str
    note: str
    remarks: tuple[str, ...] = ()
    tables: tuple[Titled, ...] = ()


@dataclass(frozen=True)
class VariantSection:
    """Parity of one variant: verdict, broken limits, a section a provider."""

    name: str
    passed: bool
    breaches: tuple[str, ...]
    providers: tuple[ProviderSection, ...]


def parity_sections(facts: ReportFacts) -> list[VariantSection]:
    """For each variant what parity found."""
    return [
        VariantSection(
            name,
            variant.parity.passed,
            tuple(variant.parity.breaches),
            tuple(_provider_section(where, found, facts) for where, found in variant.parity.providers.items()),
        )
        for name, variant in facts.variants.items()
    ]


def _provider_section(name: str, found: ProviderParity | str, facts: ReportFacts) -> ProviderSection:
    if isinstance(found, str):
        return ProviderSection(name, found)
    model = facts.exported
    tables = ((None, _agreements(found, model)), *_provider_tables(found, model))
    return ProviderSection(name, _provider_note(found, model), tuple(_remarks(found, model)), tables)


def tier_table(variants: dict[str, VariantFacts]) -> Grid:
    """Each tier's question, and its answer for every variant and provider.

    No rows where parity had no tiers.
    """
    found = {
        (name, provider): measured.tiers
        for name, variant in variants.items()
        for provider, measured in variant.parity.providers.items()
        if isinstance(measured, ProviderParity) and measured.tiers
    }
    alone = len({provider for _, provider in found}) == 1
    headers = (
        "tier",
        *(name if alone else f"{name}, {provider.removesuffix('ExecutionProvider')}" for name, provider in found),
        "question",
    )
    asked = [tier for tier in TIERS if any(tier in answers for answers in found.values())]
    rows = ((tier, *(_answer(answers, tier) for answers in found.values()), _QUESTIONS[tier]) for tier in asked)
    return Grid(headers, tuple(rows))


def _answer(tiers: Mapping[Tier, str], tier: Tier) -> str:
    told = tiers.get(tier, NONE)
    return FAILED if told == "broken" else told


def _provider_note(found: ProviderParity, model: str) -> str:
    worst = "" if found.worst_layer is None else f"worst layer {found.worst_layer}; "
    error = (
        f" ± {format_share(found.figures_error)} on {found.num_language_tokens:,} tokens" if found.figures_error else ""
    )
    figure, decode = found.figures[0], found.decode_tokens_per_second
    return (
        f"onnxruntime {found.onnxruntime}; {figure.name} {format_figure(figure)}{error}, twin "
        f"{format_figure(found.twin_figures[0])}, {model} {format_figure(found.finetuned_figures[0])}; {worst}"
        f"prefill {format_rounded(found.prefill_tokens_per_second)}"
        f"{'' if decode is None else f' and decode {format_rounded(decode)}'} tokens a second"
    )


def _remarks(found: ProviderParity, model: str) -> Iterator[str]:
    """What parity found besides its tables, in sentences."""
    if isinstance(found.weights, WeightsCheck):
        yield _describe_weights(found.weights)
    if places := _places(found):
        yield _describe_places(places)
    if found.free_run:
        yield _describe_free_run(found.free_run)
    if isinstance(found.forced, Forced):
        yield (
            f"The twin's KL from the {model} model is {format_error(found.forced.kl)} nats with that model's routing, "
            f"and {format_error(found.forced.kl_free)} with its own: the difference is the cost of other experts."
        )
    yield from _describe_flips(found.finetuned, model)
    yield (
        f"{found.num_fallback_nodes} operators of the graph ran on another provider than the one asked for."
        if found.num_fallback_nodes
        else "Every operator of the graph ran on the provider asked for."
    )


def _describe_weights(weights: WeightsCheck) -> str:
    told = f"{weights.num_rows:,} rows and {weights.num_vectors:,} vectors"
    found = (
        f"{weights.num_wrong:,} of {told} differ from the twin's" if weights.num_wrong else f"all {told} are the twin's"
    )
    return f"The file's weights were read row by row: {found}."


def _describe_places(places: Sequence[PlaceCheck]) -> str:
    worst = max(places, key=_share_of_limit)
    flips = sum(place.num_flips for place in places)
    told = (
        f" In {flips:,} tokens an 8-bit rounding inside an operator went the other way, which is no fault."
        if flips
        else ""
    )
    where = worst.part if worst.layer < 0 else f"{worst.part} of layer {worst.layer}"
    return (
        f"Each of {len(places):,} places inside the graph was compared with the twin's, given the same input: nearest "
        f"to its limit of {format_error(worst.limit)} is the {where}, with an error of {format_error(worst.error)}."
        f"{told}"
    )


def _describe_free_run(run: FreeRun) -> str:
    told = (
        "each token as the torch twin did."
        if not run.num_diverged
        else f"as the torch twin did for {run.mean_prefix:.1f} tokens on average and {run.shortest_prefix} at least; "
        f"{run.num_diverged} diverged, at a gap of at most {format_error(run.largest_gap)} of the largest logit."
    )
    return f"In greedy decoding, the package wrote {run.num_rows} texts of {run.num_tokens} tokens, {told}"


def _describe_flips(agreement: Agreement, model: str) -> Iterator[str]:
    """How many tokens went to other experts, if the package shows routers."""
    if not agreement.margins:
        return
    if agreement.flipped_share == 0:
        yield f"Every token went to the experts that the {model} model chooses, in all layers."
    elif agreement.kl_flipped is not None and agreement.kl_unflipped is not None:
        yield (
            f"Of the tokens {format_share(agreement.flipped_share)} went to other experts than the {model} "
            "model's in some layer; there the KL "
            f"is {format_error(agreement.kl_flipped)} nats, elsewhere {format_error(agreement.kl_unflipped)}."
        )


def _provider_tables(found: ProviderParity, model: str) -> Iterator[Titled]:
    yield None, tabulate(found.checks, leave_out=("padded", "decoded"))
    if tasks := [task for task in found.tasks if isinstance(task, TaskCheck)]:
        yield "Tasks", _task_table(tasks, model)
    if places := _places(found):
        yield (
            "Places inside the graph, given the same input as the twin's: the worst layer of each",
            _place_table(places),
        )
    if found.limits:
        rows = tuple(
            (column_title(name), _format_limit(limit.value), limit.origin) for name, limit in found.limits.items()
        )
        yield "Where the limits come from", Grid(("limit", "value", "origin"), rows)


def _format_limit(value: float) -> str:
    return f"{value:.4g}" if value >= _PLAIN else format_error(value)


def _places(found: ProviderParity) -> tuple[PlaceCheck, ...]:
    return () if isinstance(found.places, str) else found.places


def _share_of_limit(place: PlaceCheck) -> float:
    return place.error / place.limit if place.limit else math.inf


def _place_table(places: Sequence[PlaceCheck]) -> Grid:
    """A row for each kind of place, with its worst layer."""
    kinds: dict[str, list[PlaceCheck]] = {}
    for place in places:
        kinds.setdefault(place.part, []).append(place)
    headers = ("place", "worst layer", "relative error", "limit", "noise of float32", "tokens", "flips")
    return Grid(headers, tuple(_place_row(part, found) for part, found in kinds.items()))


def _place_row(part: str, found: Sequence[PlaceCheck]) -> tuple[str, ...]:
    worst = max(found, key=_share_of_limit)
    return (
        part,
        NONE if worst.layer < 0 else str(worst.layer),
        format_error(worst.error),
        format_error(worst.limit),
        NONE if worst.noise is None else format_error(worst.noise),
        f"{worst.num_tokens:,}",
        f"{sum(place.num_flips for place in found):,}",
    )


def _task_table(tasks: Sequence[TaskCheck], model: str) -> Grid:
    """A row for each score of each task, the judged score first."""
    headers = ("task", "examples", "score", model, "twin", "package", "change", f"same as {model}", "same as twin")
    rows = []
    for task in tasks:
        for metric in (task.metric, *sorted(set(task.package) - {task.metric})):
            scores = (format_score(scores[metric]) for scores in (task.finetuned, task.twin, task.package))
            if metric != task.metric:
                rows.append(("", "", metric, *scores, "", "", ""))
                continue
            change = format_difference(task.change, task.standard_error)
            same = (format_agreement(share) for share in (task.same_as_finetuned, task.same_as_twin))
            rows.append((task.name, f"{task.num_examples:,}", metric, *scores, change, *same))
    return Grid(headers, tuple(rows))


def _agreements(found: ProviderParity, model: str) -> Grid:
    columns: tuple[tuple[str, Callable[[Agreement], str]], ...] = (
        ("max error", lambda a: format_error(a.max_error)),
        ("mean error", lambda a: format_error(a.mean_error)),
        ("KL, nats", lambda a: format_error(a.kl)),
        ("top-1 agreement", lambda a: format_agreement(a.top1_agreement)),
        ("top-5 agreement", lambda a: format_agreement(a.top5_agreement)),
        ("worst routing", lambda a: format_agreement(min(a.routing_agreement, default=None))),
        ("worst hidden error", lambda a: format_error(max(a.hidden_error)) if a.hidden_error else NONE),
    )
    compared = ((found.twin, "torch twin, same weights"), (found.finetuned, f"{model} torch model, float32"))
    rows = tuple((name, *(text(agreement) for _, text in columns)) for agreement, name in compared)
    return Grid(("against", *(header for header, _ in columns)), rows)
