"""Lowerings that a variant will have, before any work."""

from __future__ import annotations

from transformers import PreTrainedConfig

from dense2moe.export.coverage import find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.decoder import plan_built_lowerings
from dense2moe.export.lowering import find_common_lowerings
from dense2moe.export.quantization.bits import check_head
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.parameters import Shapes, has_tied_head
from dense2moe.export.quantization.planned import PlannedTwin, plan_expert_bits
from dense2moe.export.tracing.passes.experts import describe_layer
from dense2moe.export.tracing.tracer import check_traced_type, describe_modules
from dense2moe.export.variant import QUANTIZED, STATIC, Variant, element_type


def plan_lowerings(
    config: PreTrainedConfig, shapes: Shapes, variant: Variant, quantize: QuantizeConfig, onnx: OnnxConfig
) -> tuple[str, ...]:
    """Names of the lowerings that a variant's graph can have.

    Of a graph that is built or traced, from names and shapes alone.

    Raises:
        ExportError: the variant, the architecture or the lowering asked for is not covered, or bits are asked for that
            the head cannot have.
    """
    if find_refusal(config) is None:
        return plan_built_lowerings(config, shapes, variant, quantize, onnx)
    check_head(quantize, has_tied_head(config))
    check_traced_type(config, element_type(variant, onnx.device), "variants")
    _check_learned(config, variant, quantize)
    modules = describe_modules(config, shapes)
    planned = [
        PlannedTwin(shapes, variant, quantize, bits) for bits in plan_expert_bits(variant, quantize, onnx.device)
    ]
    layers = [
        describe_layer(modules, twin, name, onnx.bits_of("experts")) for twin in planned for name in modules.experts
    ]
    return tuple(lowering.name for lowering in find_common_lowerings(layers, onnx.lowering))


def _check_learned(config: PreTrainedConfig, variant: Variant, quantize: QuantizeConfig) -> None:
    """Refuse what runs a model's layers one by one."""
    why = f"{config.model_type} is traced, and its layers are not run one by one"
    if variant in ("mixed", STATIC):
        raise ExportError(f"variants: has '{variant}'; {why}; use 'int8' or 'int4'")
    if quantize.method == "gptq" and variant in QUANTIZED:
        raise ExportError(f"quantize.method is 'gptq'; {why}; use 'search'")


def find_export_refusal(config: PreTrainedConfig, shapes: Shapes) -> str | None:
    """Why no graph is written of a model, or None.

    It is neither built nor traced.
    """
    if find_refusal(config) is None:
        return None
    try:
        describe_modules(config, shapes)
    except ExportError as error:
        return str(error)
    return None
