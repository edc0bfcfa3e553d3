"""A decoder's ONNX graph, built straight from the checkpoint's tensors.

One graph serves prefill and decode: dynamic batch and length, a KV cache that goes in as `past_key_values.N` and comes out as `present.N`.

Every pattern of padding is right. `GroupQueryAttention` on the CPU rotates a prompt by its position in the row, whatever `position_ids` says, and
masks by row length only; so rows keep their slots (a shift changes no rotary attention), later tokens get the position that follows from the row's
first real token, and padded slots are masked by `attention_bias`. Left padding thus needs no help from the caller.

Values that parity reads carry stable names: `router_logits.N` [B * S, E] of a layer with experts, and `hidden.N` [B, S, H], the residual stream after
layer N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedConfig

from export.blocks import BlockWriter, moe_layer
from export.config import OnnxConfig, QuantizeConfig, Variant
from export.embedding import add_embedding
from export.family import find_decoder_family
from export.graph import IR_VERSION, MICROSOFT, OPSETS, GraphWriter, graph_input
from export.linear import add_linear
from export.lowering import Lowering, MoeLayer, find_lowerings
from export.positions import add_positions
from export.twin import FloatWeight, QuantizedWeight, Twin, Weight, class_bits
from upcycle.checkpoint import TensorEntry

_MIN_ONNXRUNTIME = "1.23"  # GatherBlockQuantized of uint8, and 8-bit MatMulNBits of any width; float32 alone would run on 1.22


@dataclass(frozen=True)
class DecoderGraph:
    """A model, the lowering of its layers, and what it needs: the oldest onnxruntime that computes it rightly.

    `shares_buffer`: attention writes new keys and values into the buffer that it reads the past from; else the present is longer than the past.
    """

    model: ir.Model
    lowering: str
    min_onnxruntime: str
    shares_buffer: bool = True


def build_decoder(twin: Twin, config: OnnxConfig, lowering: Lowering, num_layers: int | None = None) -> DecoderGraph:
    """Build the graph of a (quantized) mixture-of-experts checkpoint; weights are read when the model is saved.

    `lowering` must be able to express the layers. With `num_layers` only so many of the first layers are built, between embedding and head.
    """
    c, family = twin.checkpoint.config, twin.family
    depth = c.num_hidden_layers if num_layers is None else num_layers
    graph = GraphWriter()
    write = BlockWriter(graph, twin, config.activation_bits)
    multipliers = family.multipliers(c)
    input_ids = graph_input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    attention_mask = graph_input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    past_shape = ["batch_size", c.num_key_value_heads, "past_sequence_length", write.head_dim]
    present_shape = ["batch_size", c.num_key_value_heads, "total_sequence_length", write.head_dim]
    past = [graph_input(f"past_key_values.{n}.{t}", ir.DataType.FLOAT, past_shape) for n in range(depth) for t in ("key", "value")]
    positions = add_positions(graph, twin, input_ids, attention_mask)
    residual = add_embedding(graph, twin.weight(family.embedding), input_ids)
    write.used.add(family.embedding)
    residual = write.multiply(residual, multipliers.embedding, "embedded_multiplied")
    normed = residual if family.attention_norm is None else write.norm(residual, family.attention_norm.format(layer=0), "layers.0.normed")
    presents: list[ir.Value] = []
    for n in range(depth):
        prefix, last = f"layers.{n}", n + 1 == depth
        update, present = write.attention(normed, n, positions, (past[2 * n], past[2 * n + 1]))
        presents += present
        update = _finish(write, update, family.attention_post_norm, n, multipliers.residual, f"{prefix}.attention_output")
        normed, residual = _add_residual(write, residual, update, _of_layer(family.ffn_norm, n), f"{prefix}.ffn_normed", f"{prefix}.attended")
        update = write.ffn(normed, n, lowering)
        update = _finish(write, update, family.ffn_post_norm, n, multipliers.residual, f"{prefix}.ffn_output")
        next_norm = family.final_norm if last else _of_layer(family.attention_norm, n + 1)
        normed_name = "final_normed" if last else f"layers.{n + 1}.normed"
        normed, residual = _add_residual(write, residual, update, next_norm, normed_name, f"hidden.{n}")
    head = family.embedding if c.tie_word_embeddings else family.head
    write.used.add(head)
    scaled = multipliers.logits != 1.0
    logits = add_linear(graph, normed, twin.weight(head), "logits_scaled" if scaled else "logits", config.activation_bits)
    logits = write.multiply(logits, 1.0 / multipliers.logits, "logits")
    _declare(logits, ir.DataType.FLOAT, ["batch_size", "sequence_length", c.vocab_size])
    for present_value in presents:
        _declare(present_value, ir.DataType.FLOAT, present_shape)
    unread = sorted(set(twin.checkpoint.entries) - write.used)
    assert num_layers is not None or not unread, f"the graph reads no {unread[:3]}"
    assert write.moe_layer is not None
    onnx_graph = ir.Graph(
        [input_ids, attention_mask, *past], [logits, *presents], nodes=graph.nodes, initializers=list(graph.initializers.values()),
        opset_imports=OPSETS, name=c.model_type,
    )  # fmt: skip
    model = ir.Model(onnx_graph, ir_version=IR_VERSION, producer_name="dense2moe")
    return DecoderGraph(model, lowering.name, oldest_onnxruntime(lowering, write.moe_layer))


def oldest_onnxruntime(lowering: Lowering, layer: MoeLayer) -> str:
    """The oldest runtime that computes a graph with this lowering of its layers."""
    return max(_MIN_ONNXRUNTIME, lowering.min_onnxruntime(layer), key=lambda version: tuple(map(int, version.split("."))))


def _of_layer(pattern: str | None, layer: int) -> str | None:
    return None if pattern is None else pattern.format(layer=layer)


def _finish(write: BlockWriter, update: ir.Value, post_norm: str | None, layer: int, factor: float, name: str) -> ir.Value:
    """What a block does to its output before it joins the residual stream: a norm, or a factor, where the architecture has them."""
    if post_norm is not None:
        update = write.norm(update, post_norm.format(layer=layer), f"{name}_normed")
    return write.multiply(update, factor, f"{name}_multiplied")


def _add_residual(
    write: BlockWriter, residual: ir.Value, update: ir.Value, norm: str | None, normed_name: str, sum_name: str
) -> tuple[ir.Value, ir.Value]:
    """residual + update, and its RMS norm, in one node; returns (normed, sum). Without a norm both are the sum."""
    if norm is None:
        joined = write.graph.op("Add", [residual, update], sum_name)
        return joined, joined
    names = [normed_name, "", "", sum_name]
    attributes = {"epsilon": float(write.config.rms_norm_eps)}
    outputs = write.graph.op_multi("SkipSimplifiedLayerNormalization", [residual, update, write.vector(norm)], names, attributes, MICROSOFT)
    return outputs[0], outputs[3]


def _declare(value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)


def find_candidates(twin: Twin, config: OnnxConfig) -> tuple[Lowering, ...]:
    """The lowerings that fit the config and can express the layers.

    Raises:
        ExportError: none can.
    """
    c, entries = twin.checkpoint.config, twin.checkpoint.entries
    layer = next(n for n in range(c.num_hidden_layers) if twin.family.router.format(layer=n) in entries)
    shapes = {name: entry.shape for name, entry in entries.items()}
    return find_lowerings(moe_layer(twin.family, c, layer, shapes, twin.weight, config.activation_bits), config.lowering)


def plan_lowerings(
    c: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], variant: Variant, quantize: QuantizeConfig, config: OnnxConfig
) -> tuple[str, ...]:
    """The names of the lowerings that `find_candidates` will find for a variant, from names and shapes alone.

    Raises:
        ExportError: the architecture or the lowering asked for is not covered.
    """
    family = find_decoder_family(c)
    bits = class_bits(variant, quantize)["experts"]

    def weight(name: str, rows: tuple[int, int] | None) -> Weight:
        shape = shapes[name]
        if bits == 32:
            return FloatWeight(TensorEntry(name, Path(), "F32", shape, 0, 4 * math.prod(shape)), rows)
        start, stop = rows or (0, math.prod(shape[:-1]))
        return QuantizedWeight(name, {}, (stop - start, shape[-1]), bits, quantize.block_size, start)

    layer = next(n for n in range(c.num_hidden_layers) if family.router.format(layer=n) in shapes)
    return tuple(lowering.name for lowering in find_lowerings(moe_layer(family, c, layer, shapes, weight, config.activation_bits), config.lowering))
