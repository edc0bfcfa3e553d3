"""A decoder's ONNX graph, built straight from the checkpoint's tensors.

One graph serves prefill and decode: dynamic batch and length, a KV cache that goes in as `past_key_values.N` and comes out as `present.N`.

Every pattern of padding is right. `GroupQueryAttention` on the CPU rotates a prompt by its position in the row, whatever `position_ids` says, and
masks by row length only; so rows keep their slots (a shift changes no rotary attention), later tokens get the position that follows from the row's
first real token, and padded slots are masked by `attention_bias`. Left padding thus needs no help from the caller.

Values that parity reads carry stable names: `router_logits.N` [B * S, E] and `hidden.N` [B, S, H], the residual stream after layer N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

from export.config import OnnxConfig, QuantizeConfig, Variant
from export.family import DecoderFamily, find_decoder_family
from export.graph import IR_VERSION, MICROSOFT, OPSETS, GraphWriter, graph_input, int64
from export.linear import add_linear
from export.lowering import Expert, MoeLayer, choose_lowering
from export.twin import FloatWeight, QuantizedWeight, Twin, Weight, class_bits
from upcycle.checkpoint import TensorEntry

_MASKED = -1e30  # finite: a row of nothing but padding then averages instead of dividing zero by zero
_ROTARY_HEAD_MULTIPLE = 16  # GroupQueryAttention refuses to rotate other head sizes on the CPU; RotaryEmbedding takes any
_MIN_ONNXRUNTIME = "1.23"  # GatherBlockQuantized of uint8, and 8-bit MatMulNBits of any width; float32 alone would run on 1.22


@dataclass(frozen=True)
class DecoderGraph:
    """A built model and what it needs: the lowering of its layers and the oldest onnxruntime that computes it rightly."""

    model: ir.Model
    lowering: str
    min_onnxruntime: str


@dataclass(frozen=True)
class _Positions:
    """Inputs that all attention layers share."""

    seqlens_k: ir.Value
    total_length: ir.Value
    cos: ir.Value
    sin: ir.Value
    position_ids: ir.Value
    attention_bias: ir.Value


def build_decoder(twin: Twin, config: OnnxConfig) -> DecoderGraph:
    """Build the graph of a (quantized) mixture-of-experts checkpoint; weights are read when the model is saved.

    Raises:
        ExportError: the lowering asked for cannot express the layers.
    """
    c, family = twin.checkpoint.config, twin.family
    graph = GraphWriter()
    input_ids = graph_input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    attention_mask = graph_input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    past_shape = ["batch_size", c.num_key_value_heads, "past_sequence_length", head_dim]
    present_shape = ["batch_size", c.num_key_value_heads, "total_sequence_length", head_dim]
    past = [graph_input(f"past_key_values.{n}.{t}", ir.DataType.FLOAT, past_shape) for n in range(c.num_hidden_layers) for t in ("key", "value")]
    positions = _add_positions(graph, twin, input_ids, attention_mask)
    eps = float(c.rms_norm_eps)

    def norm_weight(name: str) -> ir.Value:
        return graph.weight(name, ir.DataType.FLOAT, (c.hidden_size,), lambda: twin.checkpoint.read(name).to(torch.float32))

    rotary_inside = head_dim % _ROTARY_HEAD_MULTIPLE == 0
    residual = _add_embedding(graph, twin, input_ids)
    attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
    normed = graph.op("SimplifiedLayerNormalization", [residual, norm_weight(family.attention_norm.format(layer=0))], "layers.0.normed", attributes)
    presents: list[ir.Value] = []
    chosen = layer = None
    for n in range(c.num_hidden_layers):
        prefix = f"layers.{n}"
        projections = [
            add_linear(graph, normed, twin.weight(pattern.format(layer=n)), f"{prefix}.{short}", config.activation_bits)
            for short, pattern in (("query", family.query), ("key", family.key), ("value", family.value))
        ]
        if not rotary_inside:
            projections[:2] = [
                _add_rotary(graph, value, positions, heads)
                for value, heads in zip(projections, (c.num_attention_heads, c.num_key_value_heads), strict=False)
            ]
        names = [f"{prefix}.attention", f"present.{n}.key", f"present.{n}.value"]
        attention, *present = graph.op_multi(
            "GroupQueryAttention",
            [
                *projections, past[2 * n], past[2 * n + 1], positions.seqlens_k, positions.total_length,
                *((positions.cos, positions.sin, positions.position_ids) if rotary_inside else (None, None, None)), positions.attention_bias,
            ],
            names,
            {
                "num_heads": c.num_attention_heads, "kv_num_heads": c.num_key_value_heads, "do_rotary": int(rotary_inside),
                "rotary_interleaved": 0, "scale": float(head_dim**-0.5),
            },
            MICROSOFT,
        )  # fmt: skip
        presents += present
        output = add_linear(
            graph, attention, twin.weight(family.attention_output.format(layer=n)), f"{prefix}.attention_output", config.activation_bits
        )
        ffn_norm = norm_weight(family.ffn_norm.format(layer=n))
        normed, residual = _add_skip_norm(graph, residual, output, ffn_norm, f"{prefix}.ffn_normed", f"{prefix}.attended", eps)
        router = add_linear(graph, normed, twin.weight(family.router.format(layer=n)), f"{prefix}.router", 32)
        layer = moe_layer(family, c, n, twin.weight, config)
        flat = graph.constant("flat_experts", int64(-1, layer.routing.num_experts))
        router_logits = graph.op("Reshape", [router, flat], f"router_logits.{n}")
        chosen = choose_lowering(layer, config.lowering)
        mixed = chosen.lower(graph, layer, normed, router_logits)
        last = n + 1 == c.num_hidden_layers
        next_norm = family.final_norm if last else family.attention_norm.format(layer=n + 1)
        normed_name = "final_normed" if last else f"layers.{n + 1}.normed"
        normed, residual = _add_skip_norm(graph, residual, mixed, norm_weight(next_norm), normed_name, f"hidden.{n}", eps)
    head = family.embedding if c.tie_word_embeddings else family.head
    logits = add_linear(graph, normed, twin.weight(head), "logits", config.activation_bits)
    _declare(logits, ir.DataType.FLOAT, ["batch_size", "sequence_length", c.vocab_size])
    for present_value in presents:
        _declare(present_value, ir.DataType.FLOAT, present_shape)
    assert chosen is not None
    assert layer is not None
    onnx_graph = ir.Graph(
        [input_ids, attention_mask, *past], [logits, *presents], nodes=graph.nodes, initializers=list(graph.initializers.values()),
        opset_imports=OPSETS, name=c.model_type,
    )  # fmt: skip
    model = ir.Model(onnx_graph, ir_version=IR_VERSION, producer_name="dense2moe")
    oldest = max(_MIN_ONNXRUNTIME, chosen.min_onnxruntime(layer), key=lambda version: tuple(map(int, version.split("."))))
    return DecoderGraph(model, chosen.name, oldest)


def _add_rotary(graph: GraphWriter, x: ir.Value, positions: _Positions, num_heads: int) -> ir.Value:
    """Rotate x [B, S, num_heads * head_dim] by a node of its own."""
    inputs = [x, positions.position_ids, positions.cos, positions.sin]
    return graph.op("RotaryEmbedding", inputs, f"{x.name}_rotated", {"interleaved": 0, "num_heads": num_heads}, MICROSOFT)


def _declare(value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)


def moe_layer(family: DecoderFamily, c: PreTrainedConfig, n: int, weight: Callable[[str], Weight], config: OnnxConfig) -> MoeLayer:
    """Layer `n` as the lowerings see it; `weight` finds a matrix by name."""
    routing = family.routing(c)
    experts = tuple(
        Expert(*(weight(pattern.format(layer=n, expert=e)) for pattern in (family.expert_gate, family.expert_up, family.expert_down)))
        for e in range(routing.num_experts)
    )
    return MoeLayer(f"layers.{n}.moe", routing, experts, config.activation_bits)


def plan_lowering(c: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], variant: Variant, quantize: QuantizeConfig, config: OnnxConfig) -> str:
    """The lowering that `build_decoder` would choose for a variant, from names and shapes alone.

    Raises:
        ExportError: the architecture or the lowering asked for is not covered.
    """
    family = find_decoder_family(c)
    bits = class_bits(variant, quantize)["experts"]

    def weight(name: str) -> Weight:
        rows, width = shapes[name]
        if bits == 32:
            return FloatWeight(TensorEntry(name, Path(), "F32", (rows, width), 0, 4 * rows * width))
        return QuantizedWeight(name, {}, (rows, width), bits, quantize.block_size)

    return choose_lowering(moe_layer(family, c, 0, weight, config), config.lowering).name


def _add_skip_norm(
    graph: GraphWriter, residual: ir.Value, update: ir.Value, weight: ir.Value, normed_name: str, sum_name: str, eps: float
) -> tuple[ir.Value, ir.Value]:
    """residual + update, and its RMS norm; returns (normed, sum)."""
    names = [normed_name, "", "", sum_name]
    outputs = graph.op_multi("SkipSimplifiedLayerNormalization", [residual, update, weight], names, {"epsilon": eps}, MICROSOFT)
    return outputs[0], outputs[3]


def _add_embedding(graph: GraphWriter, twin: Twin, input_ids: ir.Value) -> ir.Value:
    weight = twin.weight(twin.family.embedding)
    match weight:
        case FloatWeight():
            table = graph.weight("embedding.weight", ir.DataType.FLOAT, weight.shape, weight.read)
            return graph.op("Gather", [table, input_ids], "embedded")
        case QuantizedWeight():
            # The same integers as the tied head's, flat along the hidden dimension, as this operator reads them.
            rows, columns = weight.shape[0], weight.num_blocks * weight.block_size
            if columns != weight.shape[1]:
                return _add_padded_embedding(graph, weight, input_ids)
            codes_shape = (rows, columns * weight.bits // 8)
            codes = graph.weight("embedding.codes", ir.DataType.UINT8, codes_shape, lambda: weight.read().codes.flatten(1))
            scales = graph.weight("embedding.scales", ir.DataType.FLOAT, (rows, weight.num_blocks), lambda: weight.read().scales)
            attributes = {"bits": weight.bits, "block_size": weight.block_size, "gather_axis": 0, "quantize_axis": 1}
            return graph.op("GatherBlockQuantized", [codes, input_ids, scales], "embedded", attributes, MICROSOFT)


def _add_padded_embedding(graph: GraphWriter, weight: QuantizedWeight, input_ids: ir.Value) -> ir.Value:
    """A width that the block does not divide: gather codes and scales of the rows, dequantize them, and cut the padding off."""
    codes_shape = (weight.shape[0], weight.num_blocks, weight.block_size * weight.bits // 8)
    codes = graph.weight("embedding.codes", ir.DataType.UINT8, codes_shape, lambda: weight.read().codes)
    scales_shape = (weight.shape[0], weight.num_blocks)
    scales = graph.weight("embedding.scales", ir.DataType.FLOAT, scales_shape, lambda: weight.read().scales)
    rows = graph.op("Gather", [codes, input_ids], "embedding.row_codes")
    row_scales = graph.op("Gather", [scales, input_ids], "embedding.row_scales")
    if weight.bits == 4:
        sixteen = graph.constant("sixteen", np.array(16, np.uint8))
        high = graph.op("Div", [rows, sixteen], "embedding.high")
        low = graph.op("Sub", [rows, graph.op("Mul", [high, sixteen], "embedding.high_part")], "embedding.low")
        last = graph.constant("axis_last", int64(-1))
        pair = [graph.op("Unsqueeze", [value, last], f"embedding.{name}_column") for name, value in (("low", low), ("high", high))]
        joined = graph.op("Concat", pair, "embedding.nibbles", {"axis": -1})
        blocked = graph.constant("embedding.blocked", int64(0, 0, weight.num_blocks, weight.block_size))
        rows = graph.op("Reshape", [joined, blocked], "embedding.integers")
    values = graph.op("Cast", [rows], "embedding.unsigned", {"to": int(ir.DataType.FLOAT)})
    zero_point = graph.constant("embedding.zero_point", np.array(1 << (weight.bits - 1), np.float32))
    signed = graph.op("Sub", [values, zero_point], "embedding.signed")
    column = graph.op("Unsqueeze", [row_scales, graph.constant("axis_last", int64(-1))], "embedding.scale_column")
    scaled = graph.op("Mul", [signed, column], "embedding.scaled")
    flat = graph.op("Reshape", [scaled, graph.constant("embedding.flat", int64(0, 0, -1))], "embedding.padded")
    bounds = [graph.constant(f"embedding.{name}", int64(value)) for name, value in (("start", 0), ("end", weight.shape[1]), ("axis", 2))]
    return graph.op("Slice", [flat, *bounds], "embedded")


def _add_positions(graph: GraphWriter, twin: Twin, input_ids: ir.Value, attention_mask: ir.Value) -> _Positions:
    """Row lengths, rotary tables, positions and the padding mask, from the attention mask [B, T] alone."""
    one, zero = graph.constant("one", int64(1)), graph.constant("zero", int64(0))
    shape = graph.op("Shape", [attention_mask], "mask_shape")
    batch = graph.op("Gather", [shape, zero], "batch")
    total = graph.op("Gather", [shape, one], "total")
    length = graph.op("Gather", [graph.op("Shape", [input_ids], "input_shape"), one], "length")
    total_length = graph.op("Squeeze", [graph.op("Cast", [total], "total_int32", {"to": int(ir.DataType.INT32)})], "total_length")
    last_slot = graph.op("Cast", [graph.op("Sub", [total, one], "last_slot")], "last_slot_int32", {"to": int(ir.DataType.INT32)})
    seqlens_k = graph.op("Expand", [last_slot, batch], "seqlens_k")
    # Position of a token: slot of the row's first real token, plus real tokens before it.
    count = graph.op("CumSum", [attention_mask, graph.constant("axis_one", np.array(1, np.int64))], "count")
    first = graph.op("ArgMax", [attention_mask], "first_slot", {"axis": 1, "keepdims": 1})
    slots = graph.op("Sub", [graph.op("Add", [count, first], "slot_after"), one], "slots")
    slots = graph.op("Max", [slots, zero], "slots_positive")
    begin = graph.op("Sub", [total, length], "begin")
    position_ids = graph.op("Slice", [slots, begin, total, one], "position_ids")
    is_padding = graph.op("Equal", [attention_mask, zero], "is_padding")
    masked, open_ = graph.constant("masked", np.array(_MASKED, np.float32)), graph.constant("open", np.array(0, np.float32))
    bias_BT = graph.op("Where", [is_padding, masked, open_], "bias_row")
    bias_B11T = graph.op("Unsqueeze", [bias_BT, graph.constant("axes_one_two", int64(1, 2))], "bias_column")
    full = graph.op("Concat", [one, one, length, one], "bias_shape", {"axis": 0})
    attention_bias = graph.op("Expand", [bias_B11T, full], "attention_bias")
    cos, sin = rotary_tables(twin)
    return _Positions(
        seqlens_k, total_length, graph.weight("cos", ir.DataType.FLOAT, tuple(cos.shape), lambda: cos),
        graph.weight("sin", ir.DataType.FLOAT, tuple(sin.shape), lambda: sin), position_ids, attention_bias,
    )  # fmt: skip


def rotary_tables(twin: Twin) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_position_embeddings, head_dim / 2] in float32, from transformers' own rotary embedding of this config."""
    c = twin.checkpoint.config
    positions = torch.arange(c.max_position_embeddings)[None]
    cos, sin = twin.family.rotary(c)(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
