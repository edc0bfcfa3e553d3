"""A decoder's ONNX graph, built straight from the checkpoint's tensors.

One graph serves prefill and decode: dynamic batch and length, a KV cache that goes in as `past_key_values.N` and comes
out as `present.N`.

Every pattern of padding is right. `GroupQueryAttention` on the CPU rotates a prompt by its position in the row, and
reads of `position_ids` no more than the first row's first; it masks by row length only. So rows keep their slots (a
shift changes no rotary attention), later tokens get the position that follows from the row's first real token, and
padded slots are masked by `attention_bias`. Left padding thus needs no help from the caller.

The residual stream, norms, routers and logits are float32 in every graph. In a float16 graph embedding, products,
attention, KV cache and experts are float16, and likewise in a bfloat16 one: a residual stream in float16 would overflow
in some models, and the choice of experts is read from it. Logits are float32 because our runtime and onnxruntime-genai
sample in float32 anyway; one cast in the graph spares both a copy.

Values that parity reads carry stable names: `router_logits.N` [B * S, E] of a layer with experts, and `hidden.N` [B, S,
H], the residual stream after layer N. The runtime reads `final_normed` [B, S, H] too: what the head multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PreTrainedConfig

from dense2moe.export import names
from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.layers import BlockWriter, moe_layer
from dense2moe.export.graph.positions import add_positions
from dense2moe.export.lowering import Lowering, MoeLayer, find_common_lowerings
from dense2moe.export.nodes.embedding import add_embedding
from dense2moe.export.nodes.linear import Linear, add_linear
from dense2moe.export.nodes.writer import IR_VERSION, MICROSOFT, OPSETS, GraphWriter, graph_input
from dense2moe.export.quantization.bits import check_head
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.planned import PlannedTwin, plan_expert_bits
from dense2moe.export.quantization.twin import QuantizedWeight, Twin
from dense2moe.export.variant import Device, Variant, element_type

# GatherBlockQuantized of uint8, and 8-bit MatMulNBits; float32 would run on 1.22, with GroupQueryAttention's bias
_MIN_ONNXRUNTIME = "1.23"
_MIN_ONNXRUNTIME_CUDA = "1.29"  # before it, CUDA's GroupQueryAttention refuses attention_bias

NO_LOWERING = "none"
"""What a model without experts is written with."""


@dataclass(frozen=True)
class DecoderGraph:
    """A decoder's graph, its experts' lowering, and the onnxruntime it needs.

    The lowering is "none" without experts. The oldest onnxruntime that computes it rightly.

    `shares_buffer`: attention writes new keys and values into the buffer that it reads the past from; else the present
    is longer than the past.
    """

    model: ir.Model
    lowering: str
    min_onnxruntime: str
    shares_buffer: bool = True


@dataclass(frozen=True)
class Cut:
    """A part of a model, for timing: first layers, first tokens."""

    num_layers: int
    vocabulary: int


def build_decoder(twin: Twin, config: OnnxConfig, lowering: Lowering | None, cut: Cut | None = None) -> DecoderGraph:
    """Build the graph of a (quantized) checkpoint, or of a part.

    Weights are read when the model is saved.
    `lowering` must be able to express the layers with experts; None is for a model without any.
    """
    c, family = twin.checkpoint.config, twin.family
    depth = cut.num_layers if cut else c.num_hidden_layers
    tokens = (0, cut.vocabulary) if cut else None
    graph = GraphWriter(twin.element_type, twin.float_type)
    write = BlockWriter(graph, twin, config)
    multipliers = family.multipliers(c)
    input_ids = graph_input(names.INPUT_IDS, ir.DataType.INT64, ["batch_size", "sequence_length"])
    attention_mask = graph_input(names.ATTENTION_MASK, ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    past_shape = ["batch_size", c.num_key_value_heads, "past_sequence_length", write.cached_dim]
    present_shape = ["batch_size", c.num_key_value_heads, "total_sequence_length", write.cached_dim]
    past = [
        graph_input(names.past(n, kind), graph.dtype, past_shape) for n in range(depth) for kind in names.CACHE_KINDS
    ]
    positions = add_positions(graph, twin, input_ids, attention_mask)
    residual = add_embedding(graph, twin.weight(family.name("embedding"), tokens), input_ids)
    write.used.add(family.name("embedding"))
    residual = write.multiply(residual, multipliers.embedding, names.EMBEDDED + names.MULTIPLIED)
    first_norm = family.find("attention_norm", 0)
    normed = residual if first_norm is None else write.norm(residual, first_norm, names.attention_normed(0))
    presents: list[ir.Value] = []
    for n in range(depth):
        last = n + 1 == depth
        update, present = write.attention(normed, n, positions, (past[2 * n], past[2 * n + 1]))
        presents += present
        update = _finish(
            write, update, family.find("attention_post_norm", n), multipliers.residual, names.attention_output(n)
        )
        normed, residual = _add_residual(
            write, residual, update, family.find("ffn_norm", n), names.ffn_normed(n), names.attended(n)
        )
        update = write.ffn(normed, n, lowering)
        update = _finish(write, update, family.find("ffn_post_norm", n), multipliers.residual, names.ffn_output(n))
        next_norm = family.name("final_norm") if last else family.find("attention_norm", n + 1)
        normed_name = names.FINAL_NORMED if last else names.attention_normed(n + 1)
        normed, residual = _add_residual(write, residual, update, next_norm, normed_name, names.hidden(n))
    head = family.name("embedding" if c.tie_word_embeddings else "head")
    write.used.add(head)
    scaled = multipliers.logits != 1.0
    name = f"{names.LOGITS}_scaled" if scaled else names.LOGITS
    narrow = f"{name}_narrow" if graph.element_type != "float32" else name
    logits = graph.widen(
        add_linear(graph, graph.narrow(normed), Linear(twin.weight(head, tokens)), narrow, config.bits_of("head")), name
    )
    logits = write.multiply(logits, 1.0 / multipliers.logits, names.LOGITS)
    _declare(logits, ir.DataType.FLOAT, ["batch_size", "sequence_length", cut.vocabulary if cut else c.vocab_size])
    for present_value in presents:
        _declare(present_value, graph.dtype, present_shape)
    unread = sorted(set(twin.checkpoint.entries) - write.used)
    assert cut or not unread, f"the graph reads no {unread[:3]}"
    onnx_graph = ir.Graph(
        [input_ids, attention_mask, *past],
        [logits, *presents],
        nodes=graph.nodes,
        initializers=list(graph.initializers.values()),
        opset_imports=OPSETS,
        name=c.model_type,
    )
    model = ir.Model(onnx_graph, ir_version=IR_VERSION, producer_name="dense2moe")
    return DecoderGraph(
        model, lowering.name if lowering else NO_LOWERING, oldest_onnxruntime(lowering, write.moe_layers, config.device)
    )


def oldest_onnxruntime(lowering: Lowering | None, layers: Sequence[MoeLayer], device: Device) -> str:
    """The oldest onnxruntime that computes a graph with this lowering."""
    least = _MIN_ONNXRUNTIME if device == "cpu" else _MIN_ONNXRUNTIME_CUDA
    needed = [lowering.min_onnxruntime(layer) for layer in layers] if lowering else []
    return max([least, *needed], key=lambda version: tuple(map(int, version.split("."))))


def _finish(write: BlockWriter, update: ir.Value, post_norm: str | None, factor: float, name: str) -> ir.Value:
    """A block's output, normed and multiplied, before the residual sum.

    A norm, or a factor, where the architecture has them.
    """
    if post_norm is not None:
        update = write.norm(update, post_norm, name + names.NORMED)
    return write.multiply(update, factor, name + names.MULTIPLIED)


def _add_residual(
    write: BlockWriter, residual: ir.Value, update: ir.Value, norm: str | None, normed_name: str, sum_name: str
) -> tuple[ir.Value, ir.Value]:
    """residual + update, and its RMS norm, in one node.

    Returns (normed, sum). Without a norm both are the sum.
    """
    if norm is None:
        joined = write.graph.op("Add", [residual, update], sum_name)
        return joined, joined
    shown = [normed_name, "", "", sum_name]
    attributes = {"epsilon": float(write.config.rms_norm_eps)}
    outputs = write.graph.op_multi(
        "SkipSimplifiedLayerNormalization", [residual, update, write.scale(norm)], shown, attributes, MICROSOFT
    )
    return outputs[0], outputs[3]


def _declare(value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)


def find_candidates(twin: Twin, config: OnnxConfig) -> tuple[Lowering, ...]:
    """Lowerings that fit the config and can express its layers of experts.

    None where no layer has experts.

    Raises:
        ExportError: none can.
    """
    c, entries = twin.checkpoint.config, twin.checkpoint.entries
    sparse = [n for n in range(c.num_hidden_layers) if twin.family.has_experts(n, entries)]
    layers = [moe_layer(twin.family, c, n, entries, twin.weight, twin.element_type, config) for n in sparse]
    return find_common_lowerings(_one_of_each_kind(layers), config.lowering) if layers else ()


def _one_of_each_kind(layers: Sequence[MoeLayer]) -> list[MoeLayer]:
    """One layer of each kind: kinds differ in their experts' bits.

    What a lowering can express depends on nothing else that differs between layers.
    """
    kinds = {
        layer.matrix.bits if isinstance(layer.matrix, QuantizedWeight) else 32: layer for layer in reversed(layers)
    }
    return list(kinds.values())


def plan_built_lowerings(
    c: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    variant: Variant,
    quantize: QuantizeConfig,
    config: OnnxConfig,
) -> tuple[str, ...]:
    """Names of the lowerings that `find_candidates` will find.

    For a variant, from names and shapes alone.

    Raises:
        ExportError: the architecture or the lowering asked for is not covered, or bits are asked for that the head
            cannot have.
    """
    check_head(quantize, c.tie_word_embeddings)
    family, element = find_decoder_family(c), element_type(variant, config.device)
    layer = next(n for n in range(c.num_hidden_layers) if family.has_experts(n, shapes))
    planned = [
        PlannedTwin(shapes, variant, quantize, bits) for bits in plan_expert_bits(variant, quantize, config.device)
    ]
    layers = [moe_layer(family, c, layer, each.entries, each.weight, element, config) for each in planned]
    return tuple(lowering.name for lowering in find_common_lowerings(layers, config.lowering))
