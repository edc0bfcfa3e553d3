"""Footprints of fine-tuning: what each of its steps has resident."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from dense2moe.upcycle.building.footprint import dense_shape
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.data.config import DataConfig, count_texts
from dense2moe.upcycle.footprint import (
    CAST_BYTES,
    FLOAT_BYTES,
    IMPORT_BYTES,
    Shape,
    evaluation_bytes,
    evaluation_inner_bytes,
    find_inner_width,
    layer_of,
)
from dense2moe.upcycle.memory import HEAP_BYTES
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.config import FinetuneConfig

_ADAM = 16  # bytes of a parameter that learns: weight, gradient and two moments in float32
_GRADIENT_BLOCKS = 2
_EXPERT_PARTS = (".experts.", ".block_sparse_moe.", ".shared_expert", ".shared_mlp.")
_KEPT_BYTES = 1 << 30  # of inner values at most; where they are more, layers are computed twice


def finetune_bytes(plan: UpcyclePlan, dense: Checkpoint, finetune: FinetuneConfig, data: DataConfig) -> int:
    """The most of everything that fine-tuning does one after the other.

    Evaluating both models at first, training each, evaluating each.
    """
    size = data.block_size * count_texts(data.source)
    return max(_phases(plan, dense, finetune, data.model_copy(update={"block_size": size})))


def branch_bytes(plan: UpcyclePlan, dense: Checkpoint, branch: BranchConfig, data: DataConfig) -> int:
    """The most of everything that a branch does: evaluating it, training it."""
    shape, sizes = _describe_dense(plan, dense)
    frozen = dense.num_bytes // max(1, dense.num_parameters)
    return max(
        evaluation_bytes(shape, dense.num_bytes, data.block_size),
        _training_bytes(shape, sizes, branch.as_phase(), frozen, data.block_size, plan.num_layers),
    )


def _describe_dense(plan: UpcyclePlan, dense: Checkpoint) -> tuple[Shape, dict[str, int]]:
    """The dense model's shape, and the elements of its tensors."""
    sizes = {name: entry.num_elements for name, entry in dense.entries.items() if name not in plan.dropped}
    return dense_shape(dense), sizes


def _phases(plan: UpcyclePlan, dense: Checkpoint, finetune: FinetuneConfig, data: DataConfig) -> Iterator[int]:
    config = plan.target_config
    width_field = plan.conversion.experts.width_field
    width = find_inner_width(config) if plan.conversion.keeps_rest else int(getattr(config, width_field))
    mixture = Shape.of(config, width, plan.settings.num_experts_per_tok)
    sizes = {write.spec.name: math.prod(write.spec.shape) for write in plan.writes}
    own, dense_sizes = _describe_dense(plan, dense)
    wide = finetune.dtype == "float32"
    stored = plan.num_bytes // max(1, plan.num_parameters)
    written = FLOAT_BYTES if wide else stored
    teacher = 0
    if finetune.distillation:
        teacher = dense.num_bytes + own.logits(
            finetune.batch_size // finetune.gradient_accumulation_steps, data.block_size, gradient=True
        )
    yield _gradient_bytes(mixture, plan.num_bytes, max(sizes.values()), data.block_size)
    for name_sizes, shape, bytes_now in ((sizes, mixture, plan.num_bytes), (dense_sizes, own, dense.num_bytes)):
        yield evaluation_bytes(shape, bytes_now, data.block_size)
        yield evaluation_bytes(shape, written * sum(name_sizes.values()), data.block_size)
    for number, phase in enumerate(finetune.resolve_phases()):
        frozen = stored if number == 0 else FLOAT_BYTES  # between phases weights are float32
        yield teacher + _training_bytes(mixture, sizes, phase, frozen, data.block_size, plan.num_layers)
        if finetune.control:
            yield _training_bytes(own, dense_sizes, phase, frozen, data.block_size, plan.num_layers)


def _gradient_bytes(shape: Shape, weight_bytes: int, largest: int, block_size: int) -> int:
    """Bytes of measuring the task's gradient in the routers.

    The weights, one layer's inner values, logits, and the largest weight's cast and gradient.
    """
    num_tokens = _GRADIENT_BLOCKS * block_size
    layers = FLOAT_BYTES * num_tokens * shape.hidden * shape.num_layers + 2 * shape.kept(num_tokens, learns=True)
    layer_casts = 6 * FLOAT_BYTES * shape.hidden * shape.inner
    return (
        IMPORT_BYTES
        + weight_bytes
        + layers
        + shape.logits(_GRADIENT_BLOCKS, block_size, gradient=True)
        + 3 * FLOAT_BYTES * largest
        + layer_casts
    )


def keeps_much(config: Any, num_tokens: int) -> bool:
    """Whether inner values of all layers are too many to keep.

    `num_tokens` tokens pass at once.
    """
    c = getattr(config, "decoder", config)
    width = find_inner_width(c)
    shape = Shape.of(config, int(width), int(getattr(c, "num_experts_per_tok", 1)))
    return _keeps_much(shape, num_tokens)


def _keeps_much(shape: Shape, num_tokens: int) -> bool:
    return shape.num_layers * shape.kept(num_tokens, learns=True) > _KEPT_BYTES


def _training_bytes(
    shape: Shape, sizes: dict[str, int], phase: FinetuneConfig, frozen_bytes: int, block_size: int, num_layers: int
) -> int:
    """Bytes of one phase: inner values, then gradients.

    Before the backward pass all inner values are held, after it all gradients.

    Or an evaluation on the validation split without either.
    """
    total, learning = sum(sizes.values()), count_learning(sizes, phase, num_layers)
    num_blocks = phase.batch_size // phase.gradient_accumulation_steps
    num_tokens = num_blocks * (block_size + (phase.prompt_tokens if phase.train == "prompt" else 0))
    learns = phase.train not in ("router", "lora", "prompt") or (phase.train == "router" and learning == total)
    layers = shape.num_layers * shape.kept(num_tokens, learns)
    if phase.gradient_checkpointing or 2 * learning < total or _keeps_much(shape, num_tokens):
        layers = FLOAT_BYTES * num_tokens * shape.hidden * shape.num_layers + 2 * shape.kept(num_tokens, learns=True)
    inner = layers + shape.passing(num_tokens) + shape.logits(num_blocks, block_size, gradient=True)
    evaluation = evaluation_inner_bytes(shape, block_size)
    held = frozen_bytes * (total if phase.train == "lora" else max(0, total - learning)) + HEAP_BYTES
    return (
        IMPORT_BYTES
        + held
        + CAST_BYTES
        + max((_ADAM - FLOAT_BYTES) * learning + max(inner, evaluation), _ADAM * learning)
    )


def count_learning(sizes: dict[str, int], phase: FinetuneConfig, num_layers: int) -> int:
    """Number of trainable parameters, from tensors by name and size.

    Low-rank updates are counted as for square matrices.
    """
    routers = [size for name, size in sizes.items() if _is_router(name)]
    match phase.train:
        case "all":
            return sum(sizes.values())
        case "experts":
            experts = sum(size for name, size in sizes.items() if any(part in name for part in _EXPERT_PARTS))
            return experts or sum(size for name, size in sizes.items() if ".mlp." in name)
        case "router":
            return sum(routers) or sum(sizes.values())
        case "lora":
            inside = [size for name, size in sizes.items() if layer_of(name) >= 0 and not _is_router(name)]
            return sum(routers) + sum(min(size, round(3 * phase.lora_rank * math.sqrt(size))) for size in inside)
        case "prompt":
            return 0
        case last:
            first = num_layers - int(last.removeprefix("last-"))
            return sum(
                size
                for name, size in sizes.items()
                if layer_of(name) >= first or (layer_of(name) < 0 and "embed" not in name)
            )


def _is_router(name: str) -> bool:
    return re.search(r"\.(gate|router(\.\w+)?|shared_expert_gate)\.weight$", name) is not None
