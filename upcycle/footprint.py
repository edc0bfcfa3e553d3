"""Footprints: the most memory that a stage has resident, from shapes alone.

What is counted: weights as they are held; of what learns, gradients and AdamW's two moments in float32; inner values
that the backward pass needs; logits, the largest of them; what is free in the heap; and what imports take. Constants
are measured, by `benchmarks/memory.py`. Beside this: `building.footprint`, `training.footprint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dense2moe.upcycle.memory import HEAP_BYTES

IMPORT_BYTES = 520_000_000
"""What a process has resident that has imported everything and run a small model."""

FLOAT_BYTES = 4
"""Of a float32 number."""

EVALUATION_BATCH = 8
"""Blocks that are evaluated at a time."""

CAST_BYTES = 64 << 20
"""Of a narrow matrix that is cast; see `dense2moe.upcycle.checkpoints.products`."""

_TOKENIZER_BYTES = 50_000_000


@dataclass(frozen=True)
class Shape:
    """Widths of inner values, in numbers per token."""

    hidden: int
    attention: int
    inner: int
    vocabulary: int
    num_layers: int
    copies: int

    @classmethod
    def of(cls, config: Any, width: int, copies: int) -> Shape:
        """The widths of a model whose tokens visit `copies` FFNs of `width`."""
        c = getattr(config, "decoder", config)
        heads = c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        return cls(
            c.hidden_size,
            head_dim * (heads + 2 * (getattr(c, "num_key_value_heads", None) or heads)),
            width,
            getattr(c, "vocab_size", 0),  # images have none
            c.num_hidden_layers,
            copies,
        )

    def kept(self, num_tokens: int, learns: bool) -> int:
        """Bytes of a layer's inner values that wait for the backward pass.

        Norms and residuals, attention, routed rows, and an FFN's first product.
        A frozen expert keeps only what it reads.
        """
        outside = 9 * self.hidden + 3 * self.attention + 4 * self.copies * self.hidden
        return FLOAT_BYTES * num_tokens * (outside + 2 * self.inner * self.copies * learns)

    def passing(self, num_tokens: int) -> int:
        """Bytes that a layer needs while it computes."""
        return FLOAT_BYTES * num_tokens * (6 * self.hidden + 3 * self.attention + 5 * self.inner * self.copies)

    def logits(self, num_blocks: int, block_size: int, gradient: bool) -> int:
        """Bytes of logits, of their gradient, and of one block's loss."""
        return FLOAT_BYTES * self.vocabulary * block_size * (num_blocks * (1 + gradient) + 3)


def find_inner_width(config: Any) -> int:
    """Neurons of one expert, or of a dense FFN.

    GPT-2's kin may leave it open: four times the hidden size.
    """
    section = getattr(config, "mixture", None)
    if section is not None:
        return max(int(site["intermediate_size"]) for site in section["sites"])
    fields = ("moe_intermediate_size", "intermediate_size", "n_inner")
    width = next((value for name in fields if (value := getattr(config, name, None))), None)
    return int(width or 4 * config.hidden_size)


def evaluation_inner_bytes(shape: Shape, block_size: int) -> int:
    """Bytes that evaluating several blocks at a time computes."""
    return shape.logits(EVALUATION_BATCH, block_size, gradient=False) + shape.passing(EVALUATION_BATCH * block_size)


def evaluation_bytes(shape: Shape, weight_bytes: int, block_size: int) -> int:
    """Bytes of evaluating a model: its weights, and several blocks' logits."""
    return IMPORT_BYTES + weight_bytes + evaluation_inner_bytes(shape, block_size) + CAST_BYTES + HEAP_BYTES


def data_bytes(text_bytes: int) -> int:
    """Bytes that streaming text takes.

    The tokenizer's work on pieces of it, and 2 bytes a character that is kept, by `benchmarks/data.py`.
    """
    return IMPORT_BYTES + _TOKENIZER_BYTES + 2 * text_bytes


def layer_of(name: str) -> int:
    """A tensor's layer, by its name; -1 outside of layers."""
    found = re.search(r"\.(?:layers|block)\.(\d+)\.", name)
    return int(found[1]) if found else -1
