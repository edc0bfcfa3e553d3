"""Bytes that quantized weights take, and memory of the stages, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from dense2moe.export.config import QUANTIZED, STATIC, Device, QuantizeConfig, Variant, element_type, scale_type
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.family import DecoderFamily, find_decoder_family, layer_of, rotary_switch
from dense2moe.export.quantization.bits import FLOAT_BITS, check_overrides, class_bits, plan_bits
from dense2moe.export.quantization.blockwise import is_quantized, num_blocks, zero_point_bytes
from dense2moe.export.quantization.input_scaling import READ_TOKENS
from dense2moe.export.quantization.twin import COLUMN_SCALES
from dense2moe.export.runtime.text import count_calibration_tokens
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.memory import HEAP_BYTES

_LAYER_NODES, _EXPERT_NODES = 1 << 14, 1 << 12
"""Bytes of a layer's nodes in a graph, and of those of one expert.

What the largest lowering was seen to take, and some more.
"""


_FLOAT = 4
_TIMED_BYTES = 256 << 20  # a little more than `dense2moe.export.timing` takes of a model
LOGITS_BYTES, PARITY_BATCH = 1 << 26, 4
"""Of logits that parity has at once, of each side.

And blocks of text at once at most, which is as many as have their experts compared alone.
"""
_SESSION_SHARE = 1.4  # of a package's bytes: what a session has resident


@dataclass(frozen=True)
class Packing:
    """How integers lie.

    Weights that share a scale, None being those of a row, whether blocks have zero points, and what scales are stored
    in.
    """

    block_size: int | None
    zero_points: bool
    scale_type: torch.dtype

    @classmethod
    def of(cls, variant: Variant, config: QuantizeConfig, device: Device = "cpu") -> Packing:
        """That of a variant."""
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
    """The tensors that hold the integers of one, all of whose dimensions but the last count as rows.

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
    """Bytes of tensors in a checkpoint of integers, or as floats of as many bits as the plan says."""
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
    shapes: Mapping[str, tuple[int, ...]], family: DecoderFamily, plan: Mapping[str, int], packing: Packing
) -> int:
    """Bytes in an ONNX package of the tensors in `shapes`, with the bits of `plan`.

    A tied head of integers by block is the embedding.
    """

    def packed(shape: tuple[int, ...], width: int) -> int:
        return (
            sum(spec.num_bytes for spec in integer_specs("", shape, width, packing))
            if is_quantized(width)
            else width // 8 * math.prod(shape)
        )

    total = sum(packed(shape, plan[name]) for name, shape in shapes.items())
    is_tied = family.embedding in shapes and family.head not in shapes
    if is_tied and (packing.block_size is None or not is_quantized(plan[family.embedding])):
        # written a second time, as a matrix to multiply with
        total += packed(shapes[family.embedding], plan[family.embedding])
    return total


def rotary_bytes(model: PreTrainedConfig, float_bytes: int) -> int:
    """Bytes of a package's rotary tables: cosines and sines of half a head for each position."""
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int((model.max_position_embeddings + (rotary_switch(model) or 0)) * head_dim * float_bytes)


def node_bytes(model: PreTrainedConfig, family: DecoderFamily) -> int:
    """Bytes that a package's nodes take at most."""
    experts = family.routing(model).num_experts if family.routing is not None else 0
    return int(model.num_hidden_layers) * (_LAYER_NODES + experts * _EXPERT_NODES)


def estimate_bytes(
    model: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    variant: Variant,
    config: QuantizeConfig,
    device: Device = "cpu",
    lowering: str = "auto",
) -> tuple[int, int]:
    """Bytes of a variant's ONNX package.

    And of the twin and its integers while both are made, from names and shapes alone. Variant 'mixed' has its budget,
    or, where its limit is one of perplexity, as many bytes as 8 bits everywhere; while it is made both candidates of
    all weights lie beside it.

    Raises:
        ExportError: the budget of variant 'mixed' is too small for any bits, or overrides name layers that there are
            not.
    """
    check_overrides(config, model)
    family = find_decoder_family(model)
    bits, floats, packing = (
        class_bits(variant, config, device),
        FLOAT_BITS[element_type(variant, device)],
        Packing.of(variant, config, device),
    )
    classes = {name: family.classify(name) for name in shapes}
    plan = plan_bits(shapes, classes, bits, config.overrides)

    def integer_bytes(plan: Mapping[str, int]) -> int:
        integers = [(shapes[name], width) for name, width in plan.items() if is_quantized(width)]
        return sum(spec.num_bytes for shape, width in integers for spec in integer_specs("", shape, width, packing))

    tables = rotary_bytes(model, floats // 8)
    package, artifact = package_bytes(shapes, family, plan, packing) + tables, integer_bytes(plan)
    if variant == "mixed":
        check_budget(config, package + node_bytes(model, family))
        wide = {name: 8 if is_quantized(width) else width for name, width in plan.items()}
        package = config.budget or package_bytes(shapes, family, wide, packing) + tables
        artifact += 2 * integer_bytes(wide)
        plan = wide
    if lowering == "switched" and variant in QUANTIZED and variant != STATIC:  # quantized experts are written twice
        experts = {
            name: shape for name, shape in shapes.items() if classes[name] == "experts" and is_quantized(plan[name])
        }
        package += package_bytes(experts, family, plan, packing)
    return package, artifact + sum(4 * math.prod(shape) for shape in shapes.values())


def check_budget(config: QuantizeConfig, fewest_bytes: int) -> None:
    """Refuse a budget that the fewest bits do not fit into.

    Raises:
        ExportError: it is too small.
    """
    if config.budget is not None and fewest_bytes > config.budget:
        raise ExportError(
            f"quantize.budget is {config.budget:,} bytes; the fewest bits everywhere take {fewest_bytes:,}; raise it "
            "to more than that"
        )


def quantizing_memory(
    model: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], variant: Variant, config: QuantizeConfig
) -> int:
    """The most memory that quantizing a variant has resident, imports apart.

    Where it learns from text: the states of all calibration tokens in the float model and in the one quantized so far,
    what attention and the experts read and give in both, one layer three times over (as it is, as it is quantized, and
    while it is loaded), and second moments. Otherwise, and always at the end, the largest tensor: as stored, in
    float32, and as it is written.
    """
    largest = 3 * _FLOAT * max(map(math.prod, shapes.values()))
    learns = config.method_of(8 if variant == "int8" else 4) == "gptq"
    if variant not in QUANTIZED or not (learns or config.input_scaling in ("auto", "smooth", "awq")):
        return largest
    layers: dict[int, int] = {}
    for name, shape in shapes.items():
        if (layer := layer_of(name)) >= 0:
            layers[layer] = layers.get(layer, 0) + math.prod(shape)
    widest = max((max(shape[-1], 1) for name, shape in shapes.items() if layer_of(name) >= 0), default=1)
    tokens, hidden = count_calibration_tokens(config, model) if learns else READ_TOKENS, int(model.hidden_size)
    states = _FLOAT * tokens * (12 * hidden + 4 * widest)
    return max(largest, states + 3 * _FLOAT * max(layers.values(), default=0) + 6 * 8 * widest * widest)


def exporting_memory(shapes: Mapping[str, tuple[int, ...]], package: int, is_timed: bool) -> int:
    """The most memory that writing a package of so many bytes has resident, imports apart.

    The largest tensor, and what is timed, twice.
    """
    timed = 2 * min(package, _TIMED_BYTES) if is_timed else 0
    return 3 * _FLOAT * max(map(math.prod, shapes.values())) + timed


def parity_memory(
    model: PreTrainedConfig, num_parameters: int, package: int, block_size: int, longest_row: int, measures_noise: bool
) -> int:
    """The most memory that parity has resident, imports apart.

    A reference in float32 beside the runtime's package; logits of both sides and a copy, of the longest row or of a
    batch; and what both sides show of every layer of the longest row, and of the blocks of text whose experts are
    compared alone. Where float32's noise is measured, the reference is in float64 once.
    """
    vocabulary, hidden, layers = (
        int(getattr(model, name)) for name in ("vocab_size", "hidden_size", "num_hidden_layers")
    )
    batch = max(LOGITS_BYTES, _FLOAT * vocabulary * block_size)
    logits = max(2 * _FLOAT * vocabulary * longest_row, 2 * batch) + batch
    shown = _FLOAT * layers * hidden * (6 * longest_row + 2 * PARITY_BATCH * block_size)
    read = _FLOAT * num_parameters + logits + shown
    exact = (
        2 * _FLOAT * num_parameters + 2 * (batch + _FLOAT * layers * hidden * 4 * PARITY_BATCH * block_size)
        if measures_noise
        else 0
    )
    return max(read, exact) + int(_SESSION_SHARE * package) + HEAP_BYTES
