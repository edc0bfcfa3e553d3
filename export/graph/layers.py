"""The halves of a decoder layer: attention and FFN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

from dense2moe.export import names as value_names
from dense2moe.export.coverage import ACTIVATIONS
from dense2moe.export.graph.config import OnnxConfig, ProductKind
from dense2moe.export.graph.positions import Positions, effective_window
from dense2moe.export.heads import cached_head_size, head_size
from dense2moe.export.lowering import Expert, Lowering, MoeInput, MoeLayer
from dense2moe.export.nodes.activation import add_inner
from dense2moe.export.nodes.linear import Linear, add_exact_linear, add_linear
from dense2moe.export.nodes.writer import MICROSOFT, GraphWriter, int64
from dense2moe.export.quantization.twin import Bias, FloatWeight, Twin, Weight
from dense2moe.export.rotary import rotary_switch
from dense2moe.export.variant import ElementType
from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import QUERY_KEY_VALUE, Ffn, bias_name

FindWeight = Callable[[str, tuple[int, int] | None], Weight]
"""A matrix by its name, or some of its rows."""

_ROTARY_HEAD_MULTIPLE = (
    16  # GroupQueryAttention refuses to rotate other head sizes on the CPU; RotaryEmbedding takes any
)


class BlockWriter:
    """Writes attention and FFNs of one decoder into a graph.

    Knows which of the checkpoint's tensors were read.
    Blocks read the residual stream and return what is added to it, in float32; inside they compute in the graph's
    element type.
    """

    def __init__(self, graph: GraphWriter, twin: Twin, settings: OnnxConfig) -> None:
        self.graph, self.twin, self.settings = graph, twin, settings
        self.config, self.family = twin.checkpoint.config, twin.family
        self.head_dim, self.cached_dim = head_size(self.config), cached_head_size(self.config)
        self.used: set[str] = set()
        self.moe_layers: list[MoeLayer] = []

    def has(self, name: str | None) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return name is not None and name in self.twin.checkpoint.entries

    def scale(self, name: str) -> ir.Value:
        """A norm's scale, float32."""
        self.used.add(name)
        checkpoint = self.twin.checkpoint
        return self.graph.weight(name, ir.DataType.FLOAT, checkpoint.entries[name].shape, lambda: checkpoint.read(name))

    def linear(self, x: ir.Value, names: Sequence[str], output: str, product: ProductKind) -> ir.Value:
        """x [B, S, K] times the transposes of stacked matrices [N, K].

        `names` are the matrices, stacked by rows.

        Plus their biases where they have some; called `output`.
        x and what is returned are of the graph's element type.
        """
        self.used.update(names)
        self.used.update(bias_name(name) for name in names if self.has(bias_name(name)))
        entries = self.twin.checkpoint.entries
        linears = [
            Linear(self.twin.weight(name), Bias(entries[bias_name(name)]) if self.has(bias_name(name)) else None)
            for name in names
        ]
        return add_linear(self.graph, x, linears, output, self.settings.bits_of(product))

    def norm(self, x: ir.Value, name: str, output: str) -> ir.Value:
        """RMS norm of x over its last dimension, in float32."""
        attributes = {"axis": -1, "epsilon": float(self.config.rms_norm_eps), "stash_type": 1}
        return self.graph.op("SimplifiedLayerNormalization", [x, self.scale(name)], output, attributes)

    def multiply(self, x: ir.Value, factor: float, output: str) -> ir.Value:
        """x float32 times a number; x itself, where the number is one."""
        if factor == 1.0:
            return x
        constant = self.graph.constant(f"factor_{factor:.9g}", torch.tensor(factor, dtype=torch.float32).numpy())
        return self.graph.op("Mul", [x, constant], output)

    def attention(
        self, x: ir.Value, layer: int, positions: Positions, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Attention over x [B, S, H] and the past.

        Returns its output [B, S, H] and the present keys and values.
        """
        family, c = self.family, self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        matrices = [family.name(part, layer) for part in QUERY_KEY_VALUE]
        packed = self.linear(self.graph.narrow(x), matrices, value_names.query_key_value(layer), "attention")
        # The operator rotates a prompt by slots, which are no rows of a longrope's tables.
        rotary_inside = self.head_dim % _ROTARY_HEAD_MULTIPLE == 0 and rotary_switch(c) is None
        query_key_value: tuple[ir.Value | None, ...] = (packed, None, None)
        query_norm, key_norm = family.find("query_norm", layer), family.find("key_norm", layer)
        normed = query_norm is not None and key_norm is not None and self.has(query_norm)
        if not rotary_inside or normed:
            sizes = [count * self.head_dim for count in (heads, kv_heads, kv_heads)]
            parts = [value_names.in_layer(layer, part) for part in ("query", "key", "value")]
            query, key, value = self.graph.op_multi(
                "Split", [packed, self.graph.constant("head_sizes", int64(*sizes))], parts, {"axis": -1}
            )
            if query_norm is not None and key_norm is not None and normed:
                query = self._norm_projection(query, query_norm, heads)
                key = self._norm_projection(key, key_norm, kv_heads)
            if not rotary_inside:
                query, key = (self._rotate(y, positions, count) for y, count in ((query, heads), (key, kv_heads)))
            counts = (heads, kv_heads, kv_heads)
            query_key_value = tuple(
                self._pad_heads(y, count) for y, count in zip((query, key, value), counts, strict=True)
            )
        scale = self.family.multipliers(c).attention
        tables = (positions.cos, positions.sin, positions.position_ids) if rotary_inside else (None, None, None)
        bias = positions.attention_bias[effective_window(self.twin, layer)]
        name = value_names.attention(layer)
        attended, present_key, present_value = self.graph.op_multi(
            "GroupQueryAttention",
            [*query_key_value, *past, positions.seqlens_k, positions.total_length, *tables, bias],
            [
                name if self.cached_dim == self.head_dim else f"{name}_padded",
                *(value_names.present(layer, kind) for kind in value_names.CACHE_KINDS),
            ],
            {
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "do_rotary": int(rotary_inside),
                "rotary_interleaved": 0,
                "scale": float(self.head_dim**-0.5 if scale is None else scale),
            },
            MICROSOFT,
        )
        attended = self._cut_heads(attended, heads, name)
        update = self.linear(
            attended, [family.name("attention_output", layer)], value_names.attention_output(layer), "attention"
        )
        return self.graph.widen(update), (present_key, present_value)

    def _norm_projection(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """RMS norm of each head of a projection, or of the row.

        x is [B, S, heads * head_dim].
        """
        if not self.family.norm_per_head:
            return self.graph.narrow(self.norm(self.graph.widen(x), name, f"{x.name}_normed"))
        by_head = self.graph.op("Reshape", [x, self._split(heads, self.head_dim)], f"{x.name}_heads")
        normed = self.graph.narrow(self.norm(self.graph.widen(by_head), name, f"{x.name}_normed_heads"))
        return self.graph.op("Reshape", [normed, self._join(heads, self.head_dim)], f"{x.name}_normed")

    def _pad_heads(self, x: ir.Value, heads: int) -> ir.Value:
        """Heads [B, S, heads * head_dim] padded with zeros to `cached_dim`."""
        if self.cached_dim == self.head_dim:
            return x
        wide = self.graph.widen(x) if self.graph.element_type == "bfloat16" else x  # Pad takes no bfloat16
        by_head = self.graph.op("Reshape", [wide, self._split(heads, self.head_dim)], f"{x.name}_short_heads")
        ends = self.graph.constant("head_padding", int64(*[0] * 7, self.cached_dim - self.head_dim))
        padded = self.graph.op("Pad", [by_head, ends], f"{x.name}_padded_heads")
        joined = self.graph.op("Reshape", [padded, self._join(heads, self.cached_dim)], f"{x.name}_padded")
        return joined if wide is x else self.graph.narrow(joined)

    def _cut_heads(self, x: ir.Value, heads: int, output: str) -> ir.Value:
        """Heads [B, S, heads * cached_dim] without the ends of `_pad_heads`."""
        if self.cached_dim == self.head_dim:
            return x
        by_head = self.graph.op("Reshape", [x, self._split(heads, self.cached_dim)], f"{output}_padded_heads")
        bounds = [
            self.graph.constant(f"head_{name}", int64(value))
            for name, value in (("start", 0), ("end", self.head_dim), ("axis", 3))
        ]
        cut = self.graph.op("Slice", [by_head, *bounds], f"{output}_heads")
        return self.graph.op("Reshape", [cut, self._join(heads, self.head_dim)], output)

    def _split(self, heads: int, size: int) -> ir.Value:
        """The shape [B, S, heads, size]."""
        return self.graph.constant(f"split_{heads}_heads_of_{size}", int64(0, 0, heads, size))

    def _join(self, heads: int, size: int) -> ir.Value:
        """The shape [B, S, heads * size]."""
        return self.graph.constant(f"join_{heads}_heads_of_{size}", int64(0, 0, heads * size))

    def _rotate(self, x: ir.Value, positions: Positions, num_heads: int) -> ir.Value:
        """Rotate x [B, S, num_heads * head_dim] in a separate node."""
        inputs = [x, positions.position_ids, positions.cos, positions.sin]
        return self.graph.op(
            "RotaryEmbedding", inputs, f"{x.name}_rotated", {"interleaved": 0, "num_heads": num_heads}, MICROSOFT
        )

    def ffn(self, x: ir.Value, layer: int, lowering: Lowering | None) -> ir.Value:
        """The layer's FFN over x [B, S, H].

        Its experts where it has a router, with a shared one where there is one, or else one FFN.
        """
        if not self.family.has_experts(layer, self.twin.checkpoint.entries):
            assert self.family.ffn is not None, f"layer {layer} has neither a router nor an FFN"
            return self._one_ffn(x, self.family.ffn, layer, value_names.in_layer(layer, "ffn"))
        assert lowering is not None, f"layer {layer} has experts, and no lowering to write them"
        router = self.family.name("router", layer)
        self.used.add(router)
        moe = self.layer(layer)
        flat = self.graph.constant("flat_hidden", int64(-1, moe.hidden_size))
        tokens = self.graph.op("Reshape", [x, flat], value_names.in_layer(layer, "tokens"))
        router_logits = add_exact_linear(self.graph, tokens, self.twin.weight(router), value_names.router_logits(layer))
        self.moe_layers.append(moe)
        mixed = lowering.lower(self.graph, moe, MoeInput(x, self.graph.narrow(tokens), router_logits))
        shared = self._shared(x, layer)
        return mixed if shared is None else self.graph.op("Add", [mixed, shared], value_names.mixed(layer))

    def layer(self, layer: int) -> MoeLayer:
        """The experts of a layer as the lowerings see them."""
        entries = self.twin.checkpoint.entries
        self.used.update(expert_names(self.family, self.config, layer) & entries.keys())
        if self.family.find("selection_bias") is not None:
            self.used.add(self.family.name("selection_bias", layer))
        return moe_layer(
            self.family, self.config, layer, entries, self.twin.weight, self.graph.element_type, self.settings
        )

    def _shared(self, x: ir.Value, layer: int) -> ir.Value | None:
        """The shared expert's output; None without one, or of width 0."""
        shared = self.family.shared
        if shared is None or not self.has(shared.up.format(layer=layer)):
            return None
        prefix = value_names.in_layer(layer, "shared_expert")
        scale = self.family.find("shared_scale", layer)
        if self.twin.checkpoint.entries[shared.up.format(layer=layer)].num_elements == 0:
            names = (*shared.names, *([] if scale is None else [scale]))
            self.used.update(name.format(layer=layer) for name in names)
            return None
        y = self._one_ffn(x, shared, layer, prefix)
        if scale is None:
            return y
        self.used.add(scale)
        gate = add_exact_linear(self.graph, x, self.twin.weight(scale), f"{prefix}.scale_logit")
        return self.graph.op("Mul", [y, self.graph.op("Sigmoid", [gate], f"{prefix}.scale")], f"{prefix}.scaled")

    def _one_ffn(self, x: ir.Value, ffn: Ffn, layer: int, prefix: str) -> ir.Value:
        """One FFN over x [B, S, H], both float32."""
        first = self.linear(
            self.graph.narrow(x),
            [name.format(layer=layer) for name in (ffn.gate, ffn.up) if name],
            f"{prefix}.gate_up" if ffn.is_gated else f"{prefix}.up",
            "experts",
        )
        inner = add_inner(self.graph, first, ffn.is_gated, prefix, ACTIVATIONS[self.config.hidden_act])
        return self.graph.widen(self.linear(inner, [ffn.down.format(layer=layer)], f"{prefix}.down", "experts"))


def expert_names(family: Architecture, config: PreTrainedConfig, layer: int) -> set[str]:
    """Every tensor of a layer's experts, with biases that they may have."""
    assert family.routed is not None
    num_experts = family.gate(config).num_experts
    return {name.format(layer=layer, expert=expert) for name in family.routed.names for expert in range(num_experts)}


def moe_layer(
    family: Architecture,
    config: PreTrainedConfig,
    layer: int,
    entries: Mapping[str, TensorEntry],
    weight: FindWeight,
    element_type: ElementType,
    settings: OnnxConfig,
) -> MoeLayer:
    """Layer `layer` as the lowerings see it.

    Each expert's matrices and biases, which are rows and elements of one tensor where experts are stacked.
    """
    assert family.routed is not None
    routing, names = family.gate(config), family.routed

    def find(number: int, pattern: str, bias_pattern: str | None, part: int = 0, num_parts: int = 1) -> Linear:
        """One of an expert's parts, side by side in a tensor."""
        name = pattern.format(layer=layer, expert=number)
        bias = None if bias_pattern is None else entries.get(bias_pattern.format(layer=layer, expert=number))
        rows = None
        if family.is_stacked:
            height = entries[name].shape[1] // num_parts
            start = height * (num_parts * number + part)
            rows = start, start + height
        return Linear(weight(name, rows), None if bias is None else Bias(bias, rows))

    def expert(number: int) -> Expert:
        gate: Linear | None
        if names.gate is None and names.is_gated:
            gate, up = (find(number, names.up, names.up_bias, part, 2) for part in (0, 1))
        else:
            gate = None if names.gate is None else find(number, names.gate, names.gate_bias)
            up = find(number, names.up, names.up_bias)
        return Expert(gate, up, find(number, names.down, names.down_bias))

    bias = None if family.find("selection_bias") is None else weight(family.name("selection_bias", layer), None)
    assert bias is None or isinstance(bias, FloatWeight), "a selection bias is quantized"
    experts = tuple(expert(number) for number in range(routing.num_experts))
    bits = settings.bits_of("experts")
    activation = ACTIVATIONS[config.hidden_act]
    return MoeLayer(value_names.experts(layer), routing, experts, bits, activation, bias, element_type, settings.device)
