"""Parity of any ONNX package with a checkpoint, on text files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dense2moe.convert.report.figures import format_figure
from dense2moe.convert.report.numerals import format_agreement, format_error, format_share
from dense2moe.convert.report.verdicts import describe_task
from dense2moe.export.coverage import find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.heads import cached_head_size
from dense2moe.export.opening import is_pair
from dense2moe.export.parity.answers.examples import read_tasks
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.pair import check_pair
from dense2moe.export.parity.precision import Precision, find_precision, is_dense
from dense2moe.export.parity.records import Parity, ProviderParity
from dense2moe.export.parity.single_pass import PassParity, check_single_pass, is_single_pass
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder, is_at_hand
from dense2moe.upcycle.checkpoints.loading import check_whole
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.data.blocks import read_text_blocks
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.models.table import EXPERT_COUNTS
from dense2moe.upcycle.numbers import name_specials
from dense2moe.upcycle.progress import Progress


def check_package(
    package: Path,
    reference: Path,
    files: Sequence[Path],
    block_size: int,
    num_blocks: int | None,
    config: ParityConfig,
    progress: Progress,
    twin: Path | None = None,
) -> Parity | PassParity:
    """Compare a package, of ours or of another maker.

    With the checkpoint that it was made from, on the text of `files`. A package in float32 or float16 must compute what
    the checkpoint does. Another has other weights than it, and so has a mixture whose reference is the dense model that
    it came from. So without `twin`, a checkpoint with those very weights, only the perplexity, and what it scores on
    `config.tasks`, are held to limits. All files are opened, and the package is run once, before anything is compared.

    Of a mixture of ours without a cache, an encoder's or one of images, and of an encoder and a decoder all outputs are
    compared with the checkpoint that has its weights, on drawn inputs and on the text, where some is given.

    Raises:
        ExportError, UpcycleError: in one line, what is wrong and how to mend it.
    """
    if is_pair(package) or is_single_pass(package, twin or reference):
        return _check_single_pass(package, twin or reference, files, block_size, num_blocks, config, progress)
    if not files:
        raise ExportError(f"{package}: is a decoder; data must name a text file in UTF-8")
    precision = find_precision(package)
    checkpoints = {
        path: check_whole(AutoModelForCausalLM, path).config.get_text_config(decoder=True)
        for path in (reference, twin)
        if path
    }
    tasks = read_tasks([Path(file) for file in config.tasks])
    decoder = _try_out(package, precision)
    if decoder is not None:
        for directory, known in checkpoints.items():
            _check_sizes(decoder, directory, known)
        if block_size > decoder.context_length:
            raise ExportError(
                f"{package}: its context holds {decoder.context_length:,} tokens; blocks have {block_size:,}; ask "
                "for smaller blocks"
            )
    blocks = read_text_blocks(reference, files, block_size, num_blocks)
    if decoder is not None:
        decoder.check_ids(f"{files[0]}: as {reference} reads it, the text", [int(blocks.max())])
    del decoder  # it holds all weights
    release_memory()
    is_parent = precision.has_experts and is_dense(checkpoints[reference])
    exact_twin = twin is not None or not (precision.rounds_weights or is_parent)
    return check_parity(
        ParitySubject(
            package,
            twin or reference,
            reference,
            blocks,
            precision.variant,
            precision.rounds_activations,
            exact_twin=exact_twin,
            tasks=tasks,
        ),
        config,
        progress,
    )


def _check_single_pass(
    package: Path,
    twin: Path,
    files: Sequence[Path],
    block_size: int,
    num_blocks: int | None,
    config: ParityConfig,
    progress: Progress,
) -> PassParity:
    """All outputs of a package without a cache, on inputs and text."""
    if config.tasks:
        raise ExportError(f"{package}: is no decoder by itself, and tasks are questions to decoders; leave them out")
    known = read_config(twin)
    if files and not getattr(known.get_text_config(), "vocab_size", 0):
        raise ExportError(f"{package}: reads no text; leave out {files[0]}")
    blocks = read_text_blocks(twin, files, min(block_size, find_context(known)), num_blocks) if files else None
    progress("comparing places inside", 0, 1)
    found = (check_pair if is_pair(package) else check_single_pass)(package, twin, blocks=blocks)
    progress("comparing places inside", 1, 1)
    return found


def _try_out(package: Path, precision: Precision) -> Decoder | None:
    """Run two tokens first, so that onnxruntime's refusal comes early.

    Returns the package.

    None where nothing here computes its type.
    """
    provider = CPU if precision.variant != "bfloat16" else CUDA
    if provider == CUDA and not is_at_hand(CUDA):
        return None
    decoder = Decoder(package, provider)
    decoder.run(
        decoder.new_cache(1, min(2, decoder.context_length)), np.zeros((1, min(2, decoder.context_length)), np.int64)
    )
    return decoder


def _check_sizes(decoder: Decoder, directory: Path, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose shapes differ from the package's.

    Their values could not be compared.
    """
    heads, head_dim = (
        {(heads, head_dim) for (_, heads, _, head_dim), _ in decoder.past.values()},
        getattr(config, "head_dim", None),
    )
    sizes = {
        "vocab_size": decoder.vocab_size,
        **{name: decoder.config.get(name) for name in ("hidden_size", *EXPERT_COUNTS)},
    }
    if find_refusal(config) is None:  # an architecture with one shape of keys and values, in all layers
        sizes["num_hidden_layers"] = len(decoder.past) // 2
        if len(heads) == 1:
            sizes["num_key_value_heads"], width = next(iter(heads))
            sizes |= {"head_dim": head_dim if width == cached_head_size(config) else width} if head_dim else {}
    for name, size in sizes.items():
        expected = getattr(config, name, None)
        if type(size) is int and type(expected) is int and size != expected:
            raise ExportError(
                f"{directory}: {name} is {expected:,}, and {size:,} in {decoder.path.parent}: they belong to different "
                "models; give the checkpoint that the package was made from"
            )


def is_judged_alone(parity: Parity | PassParity) -> bool:
    """Whether no checkpoint has the package's weights.

    So that it was judged by its perplexity, its files and itself.
    """
    return isinstance(parity, Parity) and all(
        isinstance(found, str) or isinstance(found.weights, str) for found in parity.providers.values()
    )


def write_json(parity: Parity | PassParity, path: Path) -> None:
    """Write all figures as strict JSON.

    NaN and infinities are strings.
    """
    facts = name_specials({**asdict(parity), "passed": parity.passed})
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe(parity: Parity | PassParity) -> Iterator[str]:
    """The outcome for a terminal, by provider."""
    if isinstance(parity, PassParity):
        yield from parity.describe()
        return
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
        yield (
            f"  weights: {found.weights.num_rows:,} rows and {found.weights.num_vectors:,} vectors, "
            f"{found.weights.num_wrong:,} not the twin's"
        )
    if not isinstance(found.places, str):
        wrong, flips = sum(not place.is_right for place in found.places), sum(place.num_flips for place in found.places)
        yield (
            f"  places inside: {len(found.places):,}, each on its own input; {wrong} wrong, {flips} flips of a "
            "rounding told apart"
        )
    beside = f"± {format_share(found.figures_error)} beside the reference's {format_figure(found.finetuned_figures[0])}"
    yield (
        f"  {found.figures[0].name} {format_figure(found.figures[0])} {beside}; KL {format_error(a.kl)}, "
        f"top-1 {format_agreement(a.top1_agreement)}, top-5 {format_agreement(a.top5_agreement)}"
    )
    largest = max(check.relative_error for check in found.checks)
    limit = found.limits.get("logits")
    held = "" if limit is None else f", at most {format_error(limit.value)}: {limit.origin}"
    yield f"  largest relative error of logits {format_error(largest)} in {len(found.checks)} ways of feeding it{held}"
    for task in found.tasks:
        yield f"  {task}" if isinstance(task, str) else f"  {describe_task(task)}"
    if found.num_fallback_nodes:
        elsewhere = ", ".join(f"{sum(ops.values())} on {where}" for where, ops in found.placement.items())
        yield f"  nodes by execution provider: {elsewhere}"
