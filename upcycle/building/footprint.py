"""Footprints of the receipt, by whole or layer, and of soups."""

from __future__ import annotations

import math
from typing import Literal

import psutil

from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.footprint import FLOAT_BYTES, IMPORT_BYTES, Shape, evaluation_bytes, find_inner_width, layer_of
from dense2moe.upcycle.models.context import count_vocabulary

_RECEIPT_ROWS = 3
_STATE_COPIES = 12
_MEMORY_SHARE = 0.7  # of what is free, for two models in float32 and what they compute
_MOST_BYTES = 3_000_000_000  # of memory, so that the receipt is never what a run needs most for


def receipt_bytes(plan: UpcyclePlan, dense: Checkpoint, block_size: int) -> int:
    """Bytes of comparing whole models: float32 copies, and both models' logits."""
    length = max(block_size + block_size // 4, 16)
    vocabulary = count_vocabulary(dense.config)
    logits = 6 * FLOAT_BYTES * vocabulary * _RECEIPT_ROWS * length
    return IMPORT_BYTES + FLOAT_BYTES * (plan.num_parameters + dense.num_parameters) + logits


def layer_receipt_bytes(plan: UpcyclePlan, dense: Checkpoint) -> int:
    """Bytes of comparing both models layer by layer.

    The largest layer of each, or the head of each, three times over while it is loaded.
    """
    layers: dict[int, int] = {}
    for write in plan.writes:
        layers[layer_of(write.spec.name)] = layers.get(layer_of(write.spec.name), 0) + math.prod(write.spec.shape)
    head = max((entry.num_elements for entry in dense.entries.values()), default=0)
    return IMPORT_BYTES + 3 * FLOAT_BYTES * max(*(size for layer, size in layers.items() if layer >= 0), 2 * head, 1)


def reading_bytes(plan: UpcyclePlan, dense: Checkpoint, num_domains: int) -> int:
    """Bytes of reading routers from text, 0 where they are drawn.

    A dozen times the states of all tokens, `max_tokens` of each of the data's or the router's own domains: as a layer
    reads and gives them, sorted by domain, and in float64 where a regression needs it.
    """
    router = plan.settings.router
    if not router.reads_text:
        return 0
    texts = len(router.domains) or (num_domains if router.reads_domains else 1)
    states = FLOAT_BYTES * int(dense.config.hidden_size) * texts * router.max_tokens
    return IMPORT_BYTES + _STATE_COPIES * states


def choose_mode(plan: UpcyclePlan, dense: Checkpoint, block_size: int = 256) -> Literal["whole", "layers"]:
    """Whether both models are held at once: by settings or free memory.

    An encoder-decoder is always held whole.
    """
    if plan.settings.receipt != "auto" and plan.conversion.family.ffn_module is not None:
        return plan.settings.receipt
    needed = receipt_bytes(plan, dense, block_size)
    fits = needed <= min(_MOST_BYTES, _MEMORY_SHARE * psutil.virtual_memory().available)
    return "whole" if fits or plan.conversion.family.ffn_module is None else "layers"


def dense_shape(dense: Checkpoint) -> Shape:
    """The dense model's widths."""
    return Shape.of(dense.config, find_inner_width(dense.config), 1)


def soup_bytes(dense: Checkpoint, block_size: int) -> int:
    """Bytes of choosing a greedy soup: one dense model in float32, evaluated."""
    return evaluation_bytes(dense_shape(dense), FLOAT_BYTES * dense.num_parameters, block_size)
