"""Parity of any ONNX decoder package with a checkpoint, on text files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from convert.numerals import format_agreement, format_error, format_perplexity, format_share
from convert.summary import describe_task
from export.config import ParityConfig
from export.errors import ExportError
from export.parity import Parity, ProviderParity, check_parity
from export.parity.precision import find_precision
from export.parity.tasks import read_tasks
from export.progress import Progress
from upcycle.data import read_text_blocks
from upcycle.numbers import name_specials


def check_package(
    package: Path, reference: Path, files: Sequence[Path], block_size: int, num_blocks: int | None, config: ParityConfig, progress: Progress,
    twin: Path | None = None,
) -> Parity:  # fmt: skip
    """Compare a package, of ours or of another maker, with the checkpoint that it was made from, on the text of `files`.

    A package in float32 or float16 must compute what the checkpoint does. Another has other weights than it, so without
    `twin`, a checkpoint with those very weights, only the perplexity, and what it scores on `config.tasks`, are held to limits.

    Raises:
        ExportError, UpcycleError: in one line, what is wrong and how to mend it.
    """
    precision = find_precision(package)
    for directory in (reference, *([twin] if twin else [])):
        if not (directory / "config.json").is_file():
            raise ExportError(f"{directory}: no config.json; it must be a checkpoint that transformers can load")
    tasks = read_tasks([Path(file) for file in config.tasks])
    blocks = read_text_blocks(reference, files, block_size, num_blocks)
    exact_twin = twin is not None or not precision.rounds_weights
    return check_parity(
        package, twin or reference, reference, blocks, precision.variant, precision.rounds_activations, config, progress, exact_twin, tasks
    )


def write_json(parity: Parity, path: Path) -> None:
    """All figures as strict JSON: what is no number is a string."""
    facts = name_specials({**asdict(parity), "passed": parity.passed})
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe(parity: Parity) -> Iterator[str]:
    """The outcome for a terminal, provider by provider."""
    for provider, found in parity.providers.items():
        if isinstance(found, str):
            yield f"{provider}: {found}"
            continue
        yield f"{provider}, onnxruntime {found.onnxruntime}"
        yield from _describe_figures(found)
        for tier, verdict in found.tiers.items():
            yield f"  {tier:<9} {verdict}"


def _describe_figures(found: ProviderParity) -> Iterator[str]:
    a = found.finetuned
    if not isinstance(found.weights, str):
        yield f"  weights: {found.weights.num_rows:,} rows and {found.weights.num_vectors:,} vectors, {found.weights.num_wrong:,} not the twin's"
    if not isinstance(found.places, str):
        wrong, flips = sum(not place.is_right for place in found.places), sum(place.num_flips for place in found.places)
        yield f"  places inside: {len(found.places):,}, each on its own input; {wrong} wrong, {flips} flips of a rounding told apart"
    beside = f"± {format_share(found.perplexity_error)} beside the reference's {format_perplexity(found.finetuned_perplexity)}"
    yield (
        f"  perplexity {format_perplexity(found.perplexity)} {beside}; KL {format_error(a.kl)}, "
        f"top-1 {format_agreement(a.top1_agreement)}, top-5 {format_agreement(a.top5_agreement)}"
    )
    largest = max(check.relative_error for check in found.checks)
    limit = found.limits.get("logits")
    held = "" if limit is None else f", at most {format_error(limit.value)}: {limit.origin}"
    yield f"  largest relative error of logits {format_error(largest)} in {len(found.checks)} ways of feeding it{held}"
    for task in found.tasks:
        yield f"  {task}" if isinstance(task, str) else f"  {describe_task(asdict(task))}"
    if found.num_fallback_nodes:
        elsewhere = ", ".join(f"{sum(ops.values())} on {where}" for where, ops in found.placement.items())
        yield f"  nodes by where they ran: {elsewhere}"
