"""The most memory that the stages of this floor have resident, from shapes and settings alone.

What is counted: weights as they are held; of what learns, gradients and AdamW's two moments in float32; inner values
that the backward pass needs; logits, the largest of them; what is free in the heap; and what imports take. Constants
are measured, by `benchmarks/memory.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.data.config import DataConfig
from dense2moe.upcycle.memory import HEAP_BYTES
from dense2moe.upcycle.training.config import FinetuneConfig

IMPORT_BYTES = 520_000_000
"""What a process has resident that has imported everything and run a small model."""

_FLOAT, _ADAM = 4, 16  # bytes of a float32 number; of a parameter that learns: weight, gradient and two moments
_EVALUATION_BLOCKS, _GRADIENT_BLOCKS, _RECEIPT_ROWS = 8, 2, 3
_EXPERT_PARTS = (".experts.", ".block_sparse_moe.", ".shared_expert", ".shared_mlp.")
_KEPT_BYTES = 1 << 30  # of inner values at most; where they are more, layers are computed twice
_TOKENIZER_BYTES = 50_000_000
_CAST_BYTES = 64 << 20  # of a narrow matrix that is cast; see `dense2moe.upcycle.checkpoints.products`


@dataclass(frozen=True)
class _Shape:
    """Widths that inner values have, in numbers a token."""

    hidden: int
    attention: int
    inner: int
    vocabulary: int
    num_layers: int
    copies: int

    @classmethod
    def of(cls, config: Any, width: int, copies: int) -> _Shape:
        """Those of a model whose tokens visit `copies` FFNs of `width`."""
        c = getattr(config, "decoder", config)
        heads = c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        return cls(
            c.hidden_size,
            head_dim * (heads + 2 * c.num_key_value_heads),
            width,
            c.vocab_size,
            c.num_hidden_layers,
            copies,
        )

    def kept(self, num_tokens: int, learns: bool) -> int:
        """Bytes of a layer's inner values that wait for the backward pass.

        Norms and residuals, attention, routed rows, and an FFN's first product.
        A frozen expert keeps only what it reads.
        """
        outside = 9 * self.hidden + 3 * self.attention + 4 * self.copies * self.hidden
        return _FLOAT * num_tokens * (outside + 2 * self.inner * self.copies * learns)

    def passing(self, num_tokens: int) -> int:
        """Bytes that a layer needs while it computes."""
        return _FLOAT * num_tokens * (6 * self.hidden + 3 * self.attention + 5 * self.inner * self.copies)

    def logits(self, num_blocks: int, block_size: int, gradient: bool) -> int:
        """Bytes of logits, of their gradient, and of one block's loss."""
        return _FLOAT * self.vocabulary * block_size * (num_blocks * (1 + gradient) + 3)


def receipt_bytes(plan: UpcyclePlan, dense: Checkpoint, block_size: int) -> int:
    """Of both models held at once: float32 copies, and the logits of texts as both say them."""
    length = max(block_size + block_size // 4, 16)
    vocabulary = int(getattr(dense.config, "vocab_size", 0))
    logits = 6 * _FLOAT * vocabulary * _RECEIPT_ROWS * length
    return IMPORT_BYTES + _FLOAT * (plan.num_parameters + dense.num_parameters) + logits


def layer_receipt_bytes(plan: UpcyclePlan, dense: Checkpoint) -> int:
    """Of both models compared layer by layer.

    The largest layer of each, or the head of each, three times over while it is loaded.
    """
    layers: dict[int, int] = {}
    for write in plan.writes:
        layers[layer_of(write.spec.name)] = layers.get(layer_of(write.spec.name), 0) + math.prod(write.spec.shape)
    head = max((entry.num_elements for entry in dense.entries.values()), default=0)
    return IMPORT_BYTES + 3 * _FLOAT * max(*(size for layer, size in layers.items() if layer >= 0), 2 * head, 1)


def data_bytes(text_bytes: int) -> int:
    """Of text that is streamed.

    The tokenizer's work on pieces of it, and 2 bytes a character that is kept, by `benchmarks/data.py`.
    """
    return IMPORT_BYTES + _TOKENIZER_BYTES + 2 * text_bytes


def finetune_bytes(plan: UpcyclePlan, dense: Checkpoint, finetune: FinetuneConfig, data: DataConfig) -> int:
    """The most of everything that fine-tuning does one after the other.

    Looks at both models, training each, evaluating each.
    """
    return max(_phases(plan, dense, finetune, data))


def _phases(plan: UpcyclePlan, dense: Checkpoint, finetune: FinetuneConfig, data: DataConfig) -> Iterator[int]:
    config = plan.target_config
    mixture = _Shape.of(
        config, int(getattr(config, plan.conversion.experts.width_field)), plan.settings.num_experts_per_tok
    )
    own = _Shape.of(dense.config, int(getattr(dense.config, "intermediate_size", config.intermediate_size)), 1)
    sizes = {write.spec.name: math.prod(write.spec.shape) for write in plan.writes}
    dense_sizes = {name: entry.num_elements for name, entry in dense.entries.items() if name not in plan.dropped}
    wide = finetune.dtype == "float32"
    stored = plan.num_bytes // max(1, plan.num_parameters)
    written = _FLOAT if wide else stored
    teacher = 0
    if finetune.distillation:
        teacher = dense.num_bytes + own.logits(
            finetune.batch_size // finetune.gradient_accumulation_steps, data.block_size, gradient=True
        )
    yield _gradient_bytes(mixture, plan.num_bytes, max(sizes.values()), data.block_size)
    for name_sizes, shape, bytes_now in ((sizes, mixture, plan.num_bytes), (dense_sizes, own, dense.num_bytes)):
        yield _evaluation_bytes(shape, bytes_now, data.block_size)
        yield _evaluation_bytes(shape, written * sum(name_sizes.values()), data.block_size)
    for number, stage in enumerate(finetune.resolve_phases()):
        frozen = stored if number == 0 else _FLOAT  # between stages weights are float32
        yield teacher + _training_bytes(mixture, sizes, stage, frozen, data.block_size, plan.num_layers)
        if finetune.control:
            yield _training_bytes(own, dense_sizes, stage, frozen, data.block_size, plan.num_layers)


def _gradient_bytes(shape: _Shape, weight_bytes: int, largest: int, block_size: int) -> int:
    """Of the routers' task gradient.

    The weights, one layer's inner values, logits, and the largest weight's cast and gradient.
    """
    num_tokens = _GRADIENT_BLOCKS * block_size
    layers = _FLOAT * num_tokens * shape.hidden * shape.num_layers + 2 * shape.kept(num_tokens, learns=True)
    layer_casts = 6 * _FLOAT * shape.hidden * shape.inner
    return (
        IMPORT_BYTES
        + weight_bytes
        + layers
        + shape.logits(_GRADIENT_BLOCKS, block_size, gradient=True)
        + 3 * _FLOAT * largest
        + layer_casts
    )


def _evaluation_bytes(shape: _Shape, weight_bytes: int, block_size: int) -> int:
    """Of a checkpoint that is measured: its weights, and logits of several blocks."""
    running = (
        shape.logits(_EVALUATION_BLOCKS, block_size, gradient=False)
        + shape.passing(_EVALUATION_BLOCKS * block_size)
        + _CAST_BYTES
    )
    return IMPORT_BYTES + weight_bytes + running + HEAP_BYTES


def keeps_much(config: Any, num_tokens: int) -> bool:
    """Whether the inner values of all layers.

    Of a mixture or a dense model, for so many tokens at once are more than layers should keep.
    """
    c = getattr(config, "decoder", config)
    width = getattr(c, "moe_intermediate_size", None) or c.intermediate_size
    shape = _Shape.of(config, int(width), int(getattr(c, "num_experts_per_tok", 1)))
    return _keeps_much(shape, num_tokens)


def _keeps_much(shape: _Shape, num_tokens: int) -> bool:
    return shape.num_layers * shape.kept(num_tokens, learns=True) > _KEPT_BYTES


def _training_bytes(
    shape: _Shape, sizes: dict[str, int], stage: FinetuneConfig, frozen_bytes: int, block_size: int, num_layers: int
) -> int:
    """Of one stage: before the backward pass all inner values, after it all gradients.

    Or a look at the validation split without either.
    """
    total, learning = sum(sizes.values()), count_learning(sizes, stage, num_layers)
    num_blocks = stage.batch_size // stage.gradient_accumulation_steps
    num_tokens = num_blocks * (block_size + (stage.prompt_tokens if stage.train == "prompt" else 0))
    learns = stage.train not in ("router", "lora", "prompt") or (stage.train == "router" and learning == total)
    layers = shape.num_layers * shape.kept(num_tokens, learns)
    if stage.gradient_checkpointing or 2 * learning < total or _keeps_much(shape, num_tokens):
        layers = _FLOAT * num_tokens * shape.hidden * shape.num_layers + 2 * shape.kept(num_tokens, learns=True)
    inner = layers + shape.passing(num_tokens) + shape.logits(num_blocks, block_size, gradient=True)
    look = shape.logits(_EVALUATION_BLOCKS, block_size, gradient=False) + shape.passing(_EVALUATION_BLOCKS * block_size)
    held = frozen_bytes * (total if stage.train == "lora" else max(0, total - learning)) + HEAP_BYTES
    return IMPORT_BYTES + held + _CAST_BYTES + max((_ADAM - _FLOAT) * learning + max(inner, look), _ADAM * learning)


def count_learning(sizes: dict[str, int], stage: FinetuneConfig, num_layers: int) -> int:
    """Parameters that learn, of tensors by name and size; low-rank updates are counted as those of square matrices."""
    routers = [size for name, size in sizes.items() if _is_router(name)]
    match stage.train:
        case "all":
            return sum(sizes.values())
        case "experts":
            experts = sum(size for name, size in sizes.items() if any(part in name for part in _EXPERT_PARTS))
            return experts or sum(size for name, size in sizes.items() if ".mlp." in name)
        case "router":
            return sum(routers) or sum(sizes.values())
        case "lora":
            inside = [size for name, size in sizes.items() if layer_of(name) >= 0 and not _is_router(name)]
            return sum(routers) + sum(min(size, round(3 * stage.lora_rank * math.sqrt(size))) for size in inside)
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


def layer_of(name: str) -> int:
    """The layer that a tensor is in, by its name; -1 outside of layers."""
    found = re.search(r"\.(?:layers|block)\.(\d+)\.", name)
    return int(found[1]) if found else -1
