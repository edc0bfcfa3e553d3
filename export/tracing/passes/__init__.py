"""Passes that turn a traced graph into a package's, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.decoder import NO_LOWERING, DecoderGraph, oldest_onnxruntime
from dense2moe.export.lowering import Lowering, MoeLayer, find_common_lowerings
from dense2moe.export.nodes.writer import MICROSOFT, OPSETS, GraphWriter
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.tracing.marking import DOMAIN
from dense2moe.export.tracing.passes.attention import lower_attention
from dense2moe.export.tracing.passes.cross_attention import branch_cross_attentions, find_cross_attentions
from dense2moe.export.tracing.passes.embedding import lower_embedding
from dense2moe.export.tracing.passes.experts import describe_layer, lower_experts
from dense2moe.export.tracing.passes.interface import name_interface
from dense2moe.export.tracing.passes.linears import lower_linears
from dense2moe.export.tracing.passes.narrow import widen_narrow_values
from dense2moe.export.tracing.passes.residual_sums import keep_residual_sums
from dense2moe.export.tracing.passes.taps import lower_taps
from dense2moe.export.tracing.tracer import Trace


def find_traced_candidates(trace: Trace, twin: Twin, config: OnnxConfig) -> tuple[Lowering, ...]:
    """Lowerings that fit the config and can express a model's layers.

    None where no layer has experts.

    Raises:
        ExportError: none can.
    """
    layers = _describe_layers(trace, twin, config)
    return find_common_lowerings(layers, config.lowering) if layers else ()


def _describe_layers(trace: Trace, twin: Twin, config: OnnxConfig) -> list[MoeLayer]:
    return [describe_layer(trace, twin, name, config.bits_of("experts")) for name in trace.experts]


def lower_traces(
    traces: Sequence[Trace], twin: Twin, config: OnnxConfig, lowering: Lowering | None
) -> dict[str, DecoderGraph]:
    """The graphs of a package by the names of their files."""
    return {trace.interface.file: lower_trace(trace, twin, config, lowering) for trace in traces}


def lower_trace(trace: Trace, twin: Twin, config: OnnxConfig, lowering: Lowering | None) -> DecoderGraph:
    """The graph of a package from a trace, which stays unchanged.

    Weights are read when the model is saved.
    """
    traced = replace(trace, model=trace.model.clone())
    model, graph = traced.model, GraphWriter(twin.element_type, twin.float_type)
    cross_attentions = find_cross_attentions(traced)
    if lowering is not None:
        lower_experts(traced, graph, twin, lowering, config.bits_of("experts"))
    tables = lower_embedding(traced, graph, twin)
    lower_linears(traced, graph, twin, config, tables)
    lower_attention(traced, graph)
    lower_taps(traced, graph)
    if config.device == "cpu":
        keep_residual_sums(traced)
    widen_narrow_values(traced)
    name_interface(traced, graph)
    for value in graph.initializers.values():
        model.graph.register_initializer(value)
    branch_cross_attentions(traced, cross_attentions)
    left = [node.op_type for node in model.graph if node.domain == DOMAIN]
    assert not left, f"no pass has replaced {left}"
    del model.graph.opset_imports[DOMAIN]
    model.graph.opset_imports[MICROSOFT] = OPSETS[MICROSOFT]
    model.producer_name, model.graph.name = "dense2moe", twin.checkpoint.config.model_type
    oldest = oldest_onnxruntime(lowering, _describe_layers(trace, twin, config), config.device)
    return DecoderGraph(model, lowering.name if lowering else NO_LOWERING, oldest, shares_buffer=False)
