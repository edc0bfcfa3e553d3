"""Bytes of packages and memory of the stages, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from transformers import PreTrainedConfig

from dense2moe.export.coverage import find_decoder_family, find_refusal
from dense2moe.export.quantization.bits import FLOAT_BITS, check_overrides, class_bits, plan_bits, plan_classes
from dense2moe.export.quantization.blockwise import is_quantized
from dense2moe.export.quantization.calibration_size import count_calibration_tokens
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.input_scaling import READ_TOKENS
from dense2moe.export.quantization.packing import (
    Packing,
    check_budget,
    find_tied,
    integer_specs,
    node_bytes,
    package_bytes,
    rotary_bytes,
)
from dense2moe.export.quantization.parameters import find_transposed
from dense2moe.export.variant import QUANTIZED, STATIC, Device, Variant, element_type
from dense2moe.upcycle.memory import HEAP_BYTES
from dense2moe.upcycle.models.context import count_vocabulary
from dense2moe.upcycle.models.parts import layer_of, matches

_FLOAT = 4
_TIMED_BYTES = 256 << 20  # a little more than `dense2moe.export.timing` takes of a model
LOGITS_BYTES, PARITY_BATCH = 1 << 26, 4
"""Of logits that parity has at once, of each side.

And blocks of text at once at most, which is as many as have their experts compared alone.
"""
LEFT_ON_DISK_BYTES = 256 << 20
"""Experts of a reference that take less stay in memory: to read a tiny layer takes longer than to compute it."""
_SESSION_SHARE = 1.4  # of a package's bytes: what a session has resident


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
    family = find_decoder_family(model) if find_refusal(model) is None else None
    bits, floats, packing = (
        class_bits(variant, config, device),
        FLOAT_BITS[element_type(variant, device)],
        Packing.of(variant, config, device),
    )
    classes = plan_classes(model, shapes)
    plan = plan_bits(shapes, classes, bits, config.overrides) | dict.fromkeys(find_transposed(model), bits["bias"])
    tied = find_tied(model, classes, shapes)

    def integer_bytes(plan: Mapping[str, int]) -> int:
        integers = [(shapes[name], width) for name, width in plan.items() if is_quantized(width)]
        return sum(spec.num_bytes for shape, width in integers for spec in integer_specs("", shape, width, packing))

    tables = 0 if family is None else rotary_bytes(model, floats // 8)
    package, artifact = package_bytes(shapes, tied, plan, packing) + tables, integer_bytes(plan)
    if variant == "mixed" and family is not None:
        check_budget(config, package + node_bytes(model, family))
        wide = {name: 8 if is_quantized(width) else width for name, width in plan.items()}
        package = config.budget or package_bytes(shapes, tied, wide, packing) + tables
        artifact += 2 * integer_bytes(wide)
        plan = wide
    if lowering == "switched" and variant in QUANTIZED and variant != STATIC:  # quantized experts are written twice
        experts = {
            name: shape for name, shape in shapes.items() if classes[name] == "experts" and is_quantized(plan[name])
        }
        package += package_bytes(experts, None, plan, packing)
    return package, artifact + sum(4 * math.prod(shape) for shape in shapes.values())


def quantizing_memory(
    model: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], variant: Variant, config: QuantizeConfig
) -> int:
    """Peak resident memory of quantizing a variant, in bytes, without imports.

    Where it learns from text, as models do that are run layer by layer: the states of all calibration tokens in the
    float model and in the one quantized so far, what attention and the experts read and give in both, one layer three
    times over (as it is, as it is quantized, and while it is loaded), and second moments. Otherwise, and always at the
    end, the largest tensor: as stored, in float32, and as it is written.
    """
    largest = 3 * _FLOAT * max(map(math.prod, shapes.values()))
    learns = config.method_of(8 if variant == "int8" else 4) == "gptq"
    reads = learns or config.input_scaling in ("auto", "smooth", "awq")
    if variant not in QUANTIZED or not reads or find_refusal(model) is not None:
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
    """Peak resident memory of writing a package, in bytes, without imports.

    The largest tensor, and twice what is timed of a package of `package` bytes.
    """
    timed = 2 * min(package, _TIMED_BYTES) if is_timed else 0
    return 3 * _FLOAT * max(map(math.prod, shapes.values())) + timed


def parity_memory(
    model: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    package: int,
    block_size: int,
    longest_row: int,
    measures_noise: bool,
) -> int:
    """Peak resident memory of parity, in bytes, without imports.

    Beside the runtime's package a reference: whole in float32 when it has been loaded, and then, where experts are
    large, with one layer's experts, logits of both sides and a copy, of the longest row or of a batch, and what both
    sides show of every layer of the longest row, and of the blocks of text whose experts are compared alone. Where
    float32's noise is measured, the reference is in float64 once.
    """
    vocabulary, hidden, layers = count_vocabulary(model), int(model.hidden_size), int(model.num_hidden_layers)
    batch = max(LOGITS_BYTES, _FLOAT * vocabulary * block_size)
    logits = max(2 * _FLOAT * vocabulary * longest_row, 2 * batch) + batch
    shown = _FLOAT * layers * hidden * (6 * longest_row + 2 * PARITY_BATCH * block_size)
    whole = sum(map(math.prod, shapes.values()))
    held = whole - _elements_on_disk(model, shapes)
    read = max(_FLOAT * whole, _FLOAT * held + logits + shown)
    exact = 2 * (batch + _FLOAT * layers * hidden * 4 * PARITY_BATCH * block_size) if measures_noise else 0
    return max(read, 2 * _FLOAT * whole + exact if measures_noise else 0) + int(_SESSION_SHARE * package) + HEAP_BYTES


def _elements_on_disk(model: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of a reference's experts that stay on the disk.

    They are the experts of all layers but the largest; none where experts stay in memory.
    """
    if find_refusal(model) is not None:  # traced: held whole
        return 0
    routed = find_decoder_family(model).routed
    patterns = () if routed is None else routed.names
    by_layer: dict[int, int] = {}
    for name, shape in shapes.items():
        if any(matches(pattern, name) for pattern in patterns):
            by_layer[layer_of(name)] = by_layer.get(layer_of(name), 0) + math.prod(shape)
    total = sum(by_layer.values())
    return 0 if _FLOAT * total < LEFT_ON_DISK_BYTES else total - max(by_layer.values())
