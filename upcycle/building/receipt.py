"""The receipt: measured proof that upcycling kept the function.

Both checkpoints are loaded by plain transformers, so nothing of ours stands between the files and the figures, which
`comparison` explains, and their limits `rounding`.

Where the dense model itself gives a number that is not finite in a dtype, as models trained in bfloat16 may in float16,
nothing is compared in that dtype, and a note says so.

Two models that do not fit into memory together are compared part by part: the embedding, each layer of both on what the
dense one's layer before gave, and the head (final norm, head, scale of the logits) on what its last layer gave. The
embedding and the head have no experts: they are equal bit for bit in every dtype, or within rounding where the dense
model's arithmetic was folded into their weights. Before that, transformers loads the names and shapes of both
checkpoints, without values, and must find none missing and none left over. Whether it ties a head that is stored is
left to transformers as well, which is given both matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dense2moe.upcycle.building.comparison import (
    DTYPES,
    Claim,
    DenseNotFiniteError,
    DenseRefusedError,
    compare_layers,
    compare_models,
)
from dense2moe.upcycle.building.expert_comparison import compare_experts
from dense2moe.upcycle.building.facts import Receipt, ReceiptLine
from dense2moe.upcycle.building.footprint import choose_mode
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.receipt_text import NO_TEXT, Text, compare_tokenizers, read_text, reads_text
from dense2moe.upcycle.building.rounding import NOISE_FACTOR, ROUNDING_LIMIT, can_be_bitwise, rounding_limit
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.loaded import find_loader
from dense2moe.upcycle.checkpoints.loading import check_whole
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress

_MAX_HALF_TOKENS = 96  # in half precision, which the CPU computes at a tenth of the speed
_EXPERTS = ("eager", "grouped_mm")
_GROUPED_ROW_BYTES = 16  # torch's grouped_mm refuses rows that are no multiple of this


def write_receipt(
    source: Path,
    output: Path,
    plan: UpcyclePlan,
    block_size: int,
    progress: Progress,
    sources: Mapping[str, Path] | None = None,
) -> Receipt:
    """Compare the dense checkpoint with the mixture that `plan` made from it.

    The limits are enforced where the plan keeps the function: with every router, or with a zero router alone.
    `block_size` is the length in tokens of a training block: one text is longer than that, and longer than an attention
    window.

    Raises:
        UpcycleError: a limit is broken, so the written checkpoint does not compute what the dense one does.
    """
    dense = open_checkpoint(source)
    mode, limit = choose_mode(plan, dense, block_size), rounding_limit(plan, dense)
    text = read_text(source, block_size) if reads_text(dense.config) else NO_TEXT
    notes = [*text.notes, *compare_tokenizers(source, output)]
    if mode == "layers":
        notes.append("compared layer by layer: decoding with a cache and float16 were not run")
        # a layer, the embedding and the head each load a few tensors, and none would miss or find the others
        for directory, side in ((source, plan.conversion.family), (output, plan.conversion.target)):
            check_whole(find_loader(directory, side.task), directory)
    comparisons: list[ReceiptLine] = []
    for number, dtype in enumerate(DTYPES):
        progress("comparing with the dense model", number, len(DTYPES))
        experts = _implementations(plan, dtype, notes)
        read = text if dtype == "float32" else text.shorten(_MAX_HALF_TOKENS)
        if mode == "layers" and dtype == "float16":
            continue  # a layer's arithmetic shows in two dtypes, and every dtype is one more pass over the disk
        claim = Claim(
            plan,
            dtype,
            plan.bitwise_at_zero and all(can_be_bitwise(*ffn, DTYPES[dtype]) for ffn in _gated_ffns(plan, dense)),
            limit if dtype == "float32" else None,
            has_biases=any(write.spec.name.endswith("_proj_bias") for write in plan.writes),
        )
        compare = compare_models if mode == "whole" else compare_layers
        found: list[ReceiptLine] = []
        try:
            for comparison in compare(source, output, claim, read, experts):
                _check(comparison, output)  # at once, since the first broken limit ends it
                found.append(comparison)
        except DenseNotFiniteError as error:
            if dtype == "float32":  # what every claim is about
                raise UpcycleError(
                    f"{source}: the dense model is not finite in float32 ({error}), so nothing can be compared; the "
                    "weights are broken; use others"
                ) from error
            notes.append(f"{dtype} was not compared: the dense model itself is not finite in it ({error})")
            continue
        except DenseRefusedError as error:
            if dtype == "float32":
                raise UpcycleError(
                    f"{source}: transformers does not run the dense model ({error}), so nothing can be compared; "
                    "run it alone, in the version of transformers that saved it"
                ) from error
            notes.append(f"{dtype} was not compared: transformers does not run the dense model in it ({error})")
            continue
        comparisons += found
    if plan.sources_differ:
        for comparison in _compare_experts(dense, output, plan, sources or {}, text.shorten(_MAX_HALF_TOKENS), limit):
            _check(comparison, output)
            comparisons.append(comparison)
        notes += _describe_merging(plan)
    if not plan.settings.gate.renormalize:
        notes.append(
            "the gate's weights are scores that do not sum to 1 (upcycle.gate.renormalize is false), so the function "
            "differs from the dense model's by design"
        )
    progress("comparing with the dense model", len(DTYPES), len(DTYPES))
    return Receipt(mode, tuple(comparisons), (*notes, *_describe_rounding(comparisons)))


def _gated_ffns(plan: UpcyclePlan, dense: Checkpoint) -> set[tuple[int, str]]:
    """Width and activation of every FFN with a gate."""
    parts = plan.settings.num_parts
    if not plan.conversion.keeps_rest:
        return {(getattr(plan.target_config, plan.conversion.experts.width_field) * parts, dense.config.hidden_act)}
    sites = plan.target_config.mixture["sites"]
    return {(site["intermediate_size"] * parts, site["activation"]) for site in sites if site["gated"]}


def _compare_experts(
    dense: Checkpoint, output: Path, plan: UpcyclePlan, sources: Mapping[str, Path], text: Text, limit: float
) -> Iterator[ReceiptLine]:
    """Each source's expert, forced; nothing where experts are not the sources' own."""
    if plan.settings.experts.kept and plan.conversion.family.ffn_module is not None:
        yield from compare_experts(dense, output, plan, open_sources(dense, sources), text, limit)


def _describe_merging(plan: UpcyclePlan) -> Iterator[str]:
    """What differs from the dense model by design, in words."""
    names = ("the dense model", *plan.sources)
    kept = "" if plan.soup is None else f" of {', '.join(names[number] for number in plan.soup)}"
    yield (
        f"the experts are the FFNs of {', '.join(plan.sources)}, and the rest is merged by the method "
        f"'{plan.settings.merging.method}'{kept}, so the function differs from the dense model's by design"
    )


def _describe_rounding(comparisons: Sequence[ReceiptLine]) -> Iterator[str]:
    """Differences caused by the dtype or the model alone, in words."""
    for dtype in dict.fromkeys(c.dtype for c in comparisons if c.halves_bitwise):
        yield (
            f"zero router, {dtype}: bitwise but for FFN outputs whose half is no {dtype} number; bitwise with "
            "these halves rounded"
        )
    for dtype in dict.fromkeys(c.dtype for c in comparisons if not math.isfinite(c.rel)):
        yield (
            f"{dtype}: the mixture overflows where the dense model does not, since its experts' outputs are larger "
            "than their weighted sum"
        )
    raised = [c.limit for c in comparisons if c.limit is not None and c.limit > ROUNDING_LIMIT and c.noise is not None]
    if raised:
        yield (
            f"float32: this model magnifies rounding, so rel may be up to {max(raised):.1e}, {NOISE_FACTOR} times the "
            "dense model's own difference between float32 and float64"
        )


def _implementations(plan: UpcyclePlan, dtype: str, notes: list[str]) -> tuple[str, ...]:
    """The experts implementations of transformers that can run these widths."""
    if plan.conversion.experts.top_1:
        return ("its own",)
    names = ("hidden_size", plan.conversion.experts.width_field)
    sites = plan.target_config.mixture["sites"] if plan.conversion.keeps_rest else [vars(plan.target_config)]
    for name, size in ((name, site[name]) for site in sites for name in names):
        row_bytes = size * DTYPES[dtype].itemsize
        if row_bytes % _GROUPED_ROW_BYTES:
            notes.append(f"grouped_mm in {dtype} was not run: it refuses rows of {row_bytes} bytes ({name} {size})")
            return ("eager",)
    return _EXPERTS


def _check(c: ReceiptLine, output: Path) -> None:
    where = f"{output}: {c.router} router, {c.dtype}, {c.experts} experts, {c.text}"
    if c.limit is not None and c.group_coverage is not None and c.group_coverage < 1:
        raise UpcycleError(
            f"{where}: {1 - c.group_coverage:.1%} of the tokens are sent to parts of different copies, as router "
            "logits tie; "
            "raise upcycle.router.logit_std or change the seed"
        )
    if c.bitwise_due and not (c.bitwise or c.halves_bitwise):
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; it must be bitwise equal")
    if c.limit is not None and not c.rel <= c.limit:
        raise UpcycleError(f"{where}: differs from the dense model by {c.rel:.1e}; at most {c.limit:.0e}")
