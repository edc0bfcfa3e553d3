"""Bytes of artifacts, of scratch and of memory, before any work."""

from __future__ import annotations

from collections.abc import Mapping

from dense2moe.convert.recipe.records import Recipe
from dense2moe.export.footprint import estimate_bytes, exporting_memory, parity_memory, quantizing_memory
from dense2moe.export.graph.config import rounds_activations
from dense2moe.upcycle.building.footprint import (
    choose_mode,
    layer_receipt_bytes,
    reading_bytes,
    receipt_bytes,
    soup_bytes,
)
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.data.config import name_domains
from dense2moe.upcycle.footprint import IMPORT_BYTES, data_bytes
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.footprint import branch_bytes, finetune_bytes

_OWN_BYTES = 130_000_000  # of the run's own process beside imports: pictures, templates, bars
TensorShapes = Mapping[str, tuple[int, ...]]


def estimate_artifacts(
    checkpoint: Checkpoint, plan: UpcyclePlan, shapes: TensorShapes, recipe: Recipe, last_stage: str | None
) -> dict[str, int]:
    """Bytes of the large artifacts, by label.

    `last_stage` is the last that this target can have, None where it has all.
    """
    sizes = {f"branch-{domain}": checkpoint.num_bytes for domain in recipe.branched}
    sizes["upcycle"] = plan.num_bytes
    if recipe.finetune and last_stage != "upcycle":
        sizes["finetune"] = _trained_bytes(checkpoint, plan, recipe.finetune)
    if last_stage is not None:
        return sizes
    for variant in recipe.variants:
        sizes[f"onnx-{variant}"], sizes[f"quantize-{variant}"] = estimate_bytes(
            plan.target_config, shapes, variant, recipe.quantize, recipe.export.device, recipe.export.lowering
        )
    return sizes


def estimate_scratch(
    checkpoint: Checkpoint, plan: UpcyclePlan, recipe: Recipe, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Bytes on disk beside the artifact while a stage runs, by label."""
    scratch = {f"branch-{domain}": _branch_scratch(checkpoint) for domain in recipe.branched}
    if recipe.finetune and "finetune" in sizes:
        scratch["finetune"] = _training_scratch(checkpoint, plan, recipe.finetune, sizes["finetune"])
    return scratch


def estimate_memory(
    checkpoint: Checkpoint,
    plan: UpcyclePlan,
    shapes: TensorShapes,
    recipe: Recipe,
    sizes: Mapping[str, int],
    text_bytes: int,
) -> dict[str, int]:
    """Each stage's peak resident memory, by label.

    A light stage has what the run's own process has.
    """
    own, block_size = IMPORT_BYTES + _OWN_BYTES, recipe.data.block_size
    planned = {
        "source": own,
        "data": data_bytes(text_bytes),
    }
    if recipe.counted_branch:
        needed = branch_bytes(plan, checkpoint, recipe.counted_branch, recipe.data)
        planned |= {f"branch-{domain}": needed for domain in recipe.branched}
    planned["upcycle"] = _upcycling_memory(checkpoint, plan, block_size, len(name_domains(recipe.data.source)))
    if recipe.finetune and "finetune" in sizes:
        planned["finetune"] = finetune_bytes(plan, checkpoint, recipe.finetune, recipe.data)
    for variant in recipe.variants:
        if (package := sizes.get(f"onnx-{variant}")) is not None:
            config = plan.target_config
            planned[f"quantize-{variant}"] = IMPORT_BYTES + quantizing_memory(config, shapes, variant, recipe.quantize)
            planned[f"onnx-{variant}"] = IMPORT_BYTES + exporting_memory(
                shapes, package, recipe.export.lowering == "auto"
            )
            longest_row = min(recipe.parity.longest_row, find_context(config))
            noise = recipe.parity.noise_blocks > 0 and not rounds_activations(variant, recipe.export)
            planned[f"parity-{variant}"] = IMPORT_BYTES + parity_memory(
                config, shapes, package, block_size, longest_row, noise
            )
    return planned | ({"report": own} if any(label.startswith("onnx") for label in sizes) else {})


def _trained_bytes(checkpoint: Checkpoint, plan: UpcyclePlan, config: FinetuneConfig) -> int:
    """Bytes of the written weights: the mixture's and both controls'."""
    is_wide = config.resolve_phases()[-1].dtype == "float32"
    mixture = 4 * plan.num_parameters if is_wide else plan.num_bytes
    dense = 4 * checkpoint.num_parameters if is_wide else checkpoint.num_bytes
    return mixture + (2 * dense if config.control else 0)


def _training_scratch(checkpoint: Checkpoint, plan: UpcyclePlan, config: FinetuneConfig, artifact_bytes: int) -> int:
    """Bytes on disk while training: each phase's weights, three checkpoints.

    The checkpoints are those of one model. They are the best, the latest and the one being written, of the model that
    takes most. A checkpoint is what learns in float32 with AdamW's two moments. Routers, low-rank updates and a prompt
    are next to nothing.
    """
    phases = config.resolve_phases()
    mixture = plan.num_parameters if any(phase.train not in ("router", "lora", "prompt") for phase in phases) else 0
    is_control_whole = config.control and any(phase.train not in ("lora", "prompt") for phase in phases)
    control = checkpoint.num_parameters if is_control_whole else 0
    return len(phases) * artifact_bytes + 3 * 3 * 4 * max(mixture, control)


def _branch_scratch(checkpoint: Checkpoint) -> int:
    """Bytes on disk while a branch trains: its weights, three checkpoints.

    A checkpoint has the weights in float32 with AdamW's two moments.
    """
    return checkpoint.num_bytes + 3 * 3 * 4 * checkpoint.num_parameters


def _upcycling_memory(checkpoint: Checkpoint, plan: UpcyclePlan, block_size: int, num_domains: int) -> int:
    """Peak memory of the receipt, of routers' text, or of a soup.

    The receipt compares whole models at once, or layer by layer.
    """
    is_soup = plan.sources and plan.settings.merging.method == "greedy-soup"
    soup = soup_bytes(checkpoint, block_size) if is_soup else 0
    reading = reading_bytes(plan, checkpoint, num_domains)
    if choose_mode(plan, checkpoint, block_size) == "whole":
        return max(soup, reading, receipt_bytes(plan, checkpoint, block_size))
    return max(soup, reading, layer_receipt_bytes(plan, checkpoint))
