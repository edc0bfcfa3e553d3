"""The layout of integers and scales on disk, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.blockwise import is_quantized, num_blocks, zero_point_bytes
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.parameters import has_tied_head
from dense2moe.export.quantization.twin import COLUMN_SCALES
from dense2moe.export.rotary import rotary_switch
from dense2moe.export.variant import STATIC, Device, Variant, element_type, scale_type
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import TensorClass

_LAYER_NODES, _EXPERT_NODES = 1 << 14, 1 << 12
"""Bytes of a layer's nodes in a graph, and of those of one expert.

What the largest lowering was seen to take, and some more.
"""


@dataclass(frozen=True)
class Packing:
    """The layout of integers.

    Weights that share a scale, None being those of a row, whether blocks have zero points, and what scales are stored
    in.
    """

    block_size: int | None
    zero_points: bool
    scale_type: torch.dtype

    @classmethod
    def of(cls, variant: Variant, config: QuantizeConfig, device: Device = "cpu") -> Packing:
        """A variant's packing."""
        if variant == STATIC:
            return cls(None, zero_points=False, scale_type=torch.float32)
        return cls(
            config.block_size,
            config.zero_points,
            torch.bfloat16 if scale_type(element_type(variant, device)) == "bfloat16" else torch.float16,
        )


def integer_specs(
    name: str, shape: tuple[int, ...], bits: int, packing: Packing, has_column_scales: bool = False
) -> list[TensorSpec]:
    """The stored tensors that hold one tensor's integers.

    Leading dimensions count as rows.

    Maybe with the scales of its columns.
    """
    rows, width = math.prod(shape[:-1]), shape[-1]  # stacked experts lie one below the other
    block_size = packing.block_size or width
    blocks = num_blocks(width, block_size)
    specs = [
        TensorSpec(f"{name}.codes", torch.uint8, (rows, blocks, block_size * bits // 8)),
        TensorSpec(f"{name}.scales", packing.scale_type, (rows, blocks)),
    ]
    if packing.zero_points:
        specs.append(TensorSpec(f"{name}.zero_points", torch.uint8, (rows, zero_point_bytes(width, bits, block_size))))
    if has_column_scales:
        specs.append(TensorSpec(f"{name}.{COLUMN_SCALES}", torch.float32, (width,)))
    return specs


def stored_bytes(names: list[str], checkpoint: Checkpoint, plan: dict[str, int], packing: Packing) -> int:
    """Bytes of a checkpoint's tensors, as integers or floats by plan."""
    total = 0
    for name in names:
        if is_quantized(plan[name]):
            total += sum(
                spec.num_bytes for spec in integer_specs(name, checkpoint.entries[name].shape, plan[name], packing)
            )
        else:
            total += checkpoint.entries[name].num_elements * plan[name] // 8
    return total


def package_bytes(
    shapes: Mapping[str, tuple[int, ...]], tied: str | None, plan: Mapping[str, int], packing: Packing
) -> int:
    """Bytes in a package of the tensors in `shapes`.

    `plan` has their bits. `tied` is the embedding that is the head too, None where there is none: of integers by block
    it lies there once.
    """

    def packed(shape: tuple[int, ...], width: int) -> int:
        return (
            sum(spec.num_bytes for spec in integer_specs("", shape, width, packing))
            if is_quantized(width)
            else width // 8 * math.prod(shape)
        )

    total = sum(packed(shape, plan[name]) for name, shape in shapes.items())
    if tied is not None and tied in shapes and (packing.block_size is None or not is_quantized(plan[tied])):
        # written a second time, as a matrix to multiply with
        total += packed(shapes[tied], plan[tied])
    return total


def find_tied(
    config: PreTrainedConfig, classes: Mapping[str, TensorClass], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The name of an embedding that is the head too, or None."""
    if "head" in classes.values() or not has_tied_head(config):
        return None
    return next(name for name, kind in classes.items() if kind == "embedding" and len(shapes[name]) > 1)


def rotary_bytes(model: PreTrainedConfig, float_bytes: int) -> int:
    """Bytes of rotary tables: cosines and sines for each position.

    Each spans half a head.
    """
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int((model.max_position_embeddings + (rotary_switch(model) or 0)) * head_dim * float_bytes)


def node_bytes(model: PreTrainedConfig, family: Architecture) -> int:
    """Upper limit of the bytes of a package's nodes."""
    experts = family.gate(model).num_experts if family.experts is not None else 0
    return int(model.num_hidden_layers) * (_LAYER_NODES + experts * _EXPERT_NODES)


def check_budget(config: QuantizeConfig, fewest_bytes: int) -> None:
    """Refuse a budget smaller than the fewest bits need.

    Raises:
        ExportError: it is too small.
    """
    if config.budget is not None and fewest_bytes > config.budget:
        raise ExportError(
            f"quantize.budget is {config.budget:,} bytes; the fewest bits everywhere take {fewest_bytes:,}; raise it "
            "to more than that"
        )
