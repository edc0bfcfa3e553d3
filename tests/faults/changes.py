"""What each fault changes in a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.faults.graphs import Graph
from tests.faults.stores import FLOATS, Array, Inexpressible, read_tensor, write_tensor

_PAST = "past_key_values."


def swap_two_experts(g: Graph) -> None:
    for part in ("gate", "up", "down"):
        for first, second in zip(g.find(g.expert(part, 0)), g.find(g.expert(part, 1)), strict=True):
            first.exchange(second)


def swap_gate_and_up(g: Graph) -> None:
    for expert in range(g.num_experts):
        for gate, up in zip(g.find(g.expert("gate", expert)), g.find(g.expert("up", expert)), strict=True):
            gate.exchange(up)


def scale_one_expert_by_2_percent(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.scale(1.02)


def scale_one_group(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.some([3]).scale(1.5, slice(0, g.at.group))


def zero_a_row(g: Graph) -> None:
    for rows in g.find(g.expert("down", g.at.expert)):
        rows.some([5]).scale(0.0)


def leave_weights_unnormalized(g: Graph) -> None:
    """In a fused operator, whose CPU kernel of integers does so whatever it is told, by a factor on what it gives."""
    if g.family.experts is None or not g.family.gate(g.config).renormalize:
        raise Inexpressible("the model does not renormalize")
    changed = False
    for node in g.nodes():
        if node.op_type == "MoE":
            g.set_attribute(node, "normalize_routing_weights", 0)
        elif node.op_type == "QMoE":
            _weigh_by_total(g, node)
        elif node.op_type == "Softmax" and (top := g.maker(node.input[0])) is not None and top.op_type == "TopK":
            _take_all_scores(g, node, top)
        elif node.op_type == "Div" and (total := g.maker(node.input[1])) is not None and _sums(g, total, node.input[0]):
            node.input[1] = g.constant(np.ones(1, helper.tensor_dtype_to_np_dtype(g.router()[0].tensor.data_type)))
        else:
            continue
        changed = True
    if not changed:
        raise Inexpressible("no node renormalizes")


def _sums(g: Graph, total: onnx.NodeProto, values: str) -> bool:
    """Whether a node gives the sum of these values, with a number that keeps it above zero or without."""
    if total.op_type == "Add" and (below := g.maker(total.input[0])) is not None:
        total = below
    return total.op_type == "ReduceSum" and total.input[0] == values


def _weigh_by_total(g: Graph, node: onnx.NodeProto) -> None:
    def build(value: str, out: str) -> list[onnx.NodeProto]:
        k = g.constant(np.array([g.config.num_experts_per_tok], np.int64))
        last, zero, one = (g.constant(np.array([number], np.int64)) for number in (-1, 0, 1))
        return [
            helper.make_node("Softmax", [node.input[1]], [f"{out}.all"], axis=-1),
            helper.make_node("TopK", [f"{out}.all", k], [f"{out}.chosen", f"{out}.numbers"], axis=-1),
            helper.make_node("ReduceSum", [f"{out}.chosen", last], [f"{out}.total"], keepdims=1),
            helper.make_node("Shape", [value], [f"{out}.shape"]),
            helper.make_node("Slice", [f"{out}.shape", zero, last], [f"{out}.leading"]),
            helper.make_node("Concat", [f"{out}.leading", one], [f"{out}.column"], axis=0),
            helper.make_node("Reshape", [f"{out}.total", f"{out}.column"], [f"{out}.factor"]),
            helper.make_node("Mul", [value, f"{out}.factor"], [out]),
        ]

    g.alter(node.output[0], build, shown=True)


def _take_all_scores(g: Graph, weights: onnx.NodeProto, top: onnx.NodeProto) -> None:
    name = weights.output[0]
    graph = next(graph for graph in g.graphs if any(name in node.output for node in graph.node))
    place = next(n for n, node in enumerate(graph.node) if name in node.output)
    graph.node.remove(graph.node[place])
    graph.node.insert(place, helper.make_node("Softmax", [top.input[0]], [f"fault.{name}.all"], axis=-1))
    graph.node.insert(
        place + 1, helper.make_node("GatherElements", [f"fault.{name}.all", top.output[1]], [name], axis=1)
    )


def quantize_the_router(g: Graph) -> None:
    store, _ = g.router()
    rows = np.arange(len(store.values))
    scale = np.abs(store.values).max(axis=1, keepdims=True) / 127
    store.write(rows, ((np.round(store.values / scale) * scale).astype(store.array.dtype),))


def _raise_a_router_logit(g: Graph, shown: bool) -> None:
    store, product = g.router()
    change = np.zeros(g.num_experts, np.float32)
    change[g.at.expert] = 0.05
    added = g.number(change, store.tensor.data_type)
    g.alter(product.output[0], lambda value, out: [helper.make_node("Add", [value, added], [out])], shown)


def raise_a_router_logit(g: Graph) -> None:
    _raise_a_router_logit(g, shown=True)


def raise_a_router_logit_behind_its_name(g: Graph) -> None:
    """The value that shows the router's logits is right, and what is routed by is not."""
    _raise_a_router_logit(g, shown=False)


def take_another_rope_theta(g: Graph) -> None:
    half = g.head_size // 2
    exponents = -np.arange(half) / half
    theta = float((g.config.rope_parameters or {}).get("rope_theta", 10000.0))
    right, wrong, found = theta**exponents, (theta / 10) ** exponents, False
    for tensor in g.tensors.values():
        size = int(np.prod(tensor.dims))
        if tensor.data_type not in FLOATS or size % half or not tensor.dims:
            continue
        value = read_tensor(tensor)
        flat = value.astype(np.float64).reshape(-1, half)
        positions = np.arange(len(flat))[:, None]
        tables = {"frequencies": (right, wrong)} if len(flat) == 1 else {}
        tables |= {
            "cos": (np.cos(positions * right), np.cos(positions * wrong)),
            "sin": (np.sin(positions * right), np.sin(positions * wrong)),
        }
        for true, false in tables.values():
            if np.abs(flat - true).max() < 5e-3 and size > half * (len(flat) == 1 and 0):
                write_tensor(tensor, np.broadcast_to(false, flat.shape).astype(value.dtype).reshape(value.shape))
                found = True
                break
    if not found:
        raise Inexpressible("no rotary table or frequencies stand in the graph")


def drop_the_window(g: Graph) -> None:
    window = getattr(g.config, "sliding_window", None)
    if window is None or window >= g.config.max_position_embeddings:
        raise Inexpressible("the model has no window")
    found = False
    for node in g.nodes():
        if any(attribute.name == "local_window_size" and attribute.i > 0 for attribute in node.attribute):
            g.set_attribute(node, "local_window_size", -1)
            found = True
        for place, name in enumerate(node.input):
            tensor = (
                g.resolve(name)
                if node.op_type in ("Sub", "Add", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
                else None
            )
            if (
                tensor is not None
                and tensor.data_type == TensorProto.INT64
                and abs(int(read_tensor(tensor).flat[0])) == window
                and read_tensor(tensor).size == 1
            ):
                node.input[place] = g.constant(np.sign(read_tensor(tensor)) * np.int64(10**6))
                found = True
    if not found:
        raise Inexpressible("no comparison with the window stands in the graph")


def raise_epsilon(g: Graph) -> None:
    """In every norm."""
    found = False
    for node in g.nodes():
        if any(attribute.name == "epsilon" for attribute in node.attribute):
            g.set_attribute(node, "epsilon", 1e-4)
            found = True
        elif node.op_type == "Add" and any(
            (made := g.maker(name)) is not None and made.op_type == "ReduceMean" for name in node.input
        ):
            place = next(place for place, name in enumerate(node.input) if g.resolve(name) is not None)
            tensor = g.resolve(node.input[place])
            assert tensor is not None
            node.input[place] = g.constant(np.full_like(read_tensor(tensor), 1e-4))
            found = True
    if not found:
        raise Inexpressible("no norm's epsilon stands in the graph")


def _change_a_norm(g: Graph, name: str | None) -> None:
    value = g.read(name)
    found = [
        tensor for tensor in g.tensors.values() if list(tensor.dims) == list(value.shape) and tensor.data_type in FLOATS
    ]
    found = [tensor for tensor in found if np.abs(read_tensor(tensor).astype(np.float32) - value).max() < 4e-3]
    if len(found) != 1:
        raise Inexpressible(f"{len(found)} weights of the file are this norm's")
    changed = read_tensor(found[0]).copy()
    changed[7] = changed[7] * np.asarray(1.01, changed.dtype)
    write_tensor(found[0], changed)


def change_an_attention_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.find("attention_norm") or g.family.find("attention_post_norm"))


def change_an_ffn_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.find("ffn_norm") or g.family.find("ffn_post_norm"))


def change_the_final_norm(g: Graph) -> None:
    _change_a_norm(g, g.family.name("final_norm"))


def _no_norm_of(g: Graph, name: str | None) -> None:
    if name is not None and name.format(layer=g.at.layer) in g.checkpoint.entries:
        raise Inexpressible("a norm of what the rows give takes their length away")


def stretch_keys_of_one_head(g: Graph) -> None:
    _no_norm_of(g, g.family.find("key_norm"))
    for rows in g.find(g.read(g.family.name("key"))):
        rows.some(slice(g.at.head * g.head_size, (g.at.head + 1) * g.head_size)).scale(1.01)


def stretch_values_of_one_head(g: Graph) -> None:
    for rows in g.find(g.read(g.family.name("value"))):
        rows.some(slice(g.at.head * g.head_size, (g.at.head + 1) * g.head_size)).scale(1.01)


def change_the_temperature(g: Graph) -> None:
    """Of attention in one layer: the operator's attribute, or queries that are as much longer."""
    present = f"present.{g.at.layer}.key"
    node = g.maker(present)
    if node is not None and node.op_type == "GroupQueryAttention":
        scale = (
            next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 0.0) or g.head_size**-0.5
        )
        g.set_attribute(node, "scale", scale * 1.01)
        return
    _no_norm_of(g, g.family.find("query_norm"))
    for rows in g.find(g.read(g.family.name("query"))):
        rows.scale(1.01)


def swap_embedding_rows(g: Graph) -> None:
    _permute_embedding(g, {0: 1, 1: 0})


def repeat_an_embedding_row(g: Graph) -> None:
    """One wrong row: a token has another one's."""
    _permute_embedding(g, {0: 1})


def _permute_embedding(g: Graph, taken: Mapping[int, int]) -> None:
    """Rows of all that is gathered by token, integers and scales alike.

    Token number n's become those of token number taken[n].
    """
    found = False
    for node in g.readers("input_ids"):
        if node.op_type not in ("Gather", "GatherBlockQuantized"):
            continue
        for name in node.input:
            tensor = g.resolve(name)
            if tensor is not None and tensor.dims and tensor.dims[0] == g.config.vocab_size:
                value = read_tensor(tensor).copy()
                old = value.copy()
                for to, source in taken.items():
                    value[g.at.tokens[to]] = old[g.at.tokens[source]]
                write_tensor(tensor, value)
                found = True
    if not found:
        raise Inexpressible("nothing is gathered by input_ids")


def _head(g: Graph) -> Array:
    return g.read(g.family.name("embedding" if g.config.tie_word_embeddings else "head"))


def scale_a_head_row(g: Graph) -> None:
    for rows in g.find(_head(g)):
        rows.some([g.at.tokens[0]]).scale(1.1)


def swap_head_rows(g: Graph) -> None:
    for rows in g.find(_head(g)):
        rows.some([g.at.tokens[0]]).exchange(rows.some([g.at.tokens[1]]))


def _scale_logits(g: Graph, factor: float) -> None:
    by = g.number(factor, g.elements("logits"))
    g.alter("logits", lambda value, out: [helper.make_node("Mul", [value, by], [out])], shown=True)


def scale_logits_by_a_thousandth(g: Graph) -> None:
    _scale_logits(g, 1.001)


def scale_logits_by_2_percent(g: Graph) -> None:
    _scale_logits(g, 1.02)


# Faults of the interface: masks, positions and the cache.


def shift_the_cache(g: Graph) -> None:
    """What is cached is read one slot late, in every layer: the first key is there twice, and the last one not."""
    axis, step = g.constant(np.array([2], np.int64)), g.constant(np.array([1], np.int64))
    zero, one, last = (g.constant(np.array([number], np.int64)) for number in (0, 1, -1))
    for name in g.past():
        g.alter(
            name,
            lambda value, out: [
                helper.make_node("Slice", [value, zero, one, axis, step], [f"{out}.first"]),
                helper.make_node("Slice", [value, zero, last, axis, step], [f"{out}.rest"]),
                helper.make_node("Concat", [f"{out}.first", f"{out}.rest"], [out], axis=2),
            ],
        )


def shorten_the_cache(g: Graph) -> None:
    """Where something is cached, rows are said to be one token shorter, so a new key takes the last one's place."""
    node = next((node for node in g.nodes() if node.op_type == "GroupQueryAttention"), None)
    if node is None:
        raise Inexpressible("the graph tells no operator how long its rows are")
    steps = _past_is_there(g, "fault.shorter", np.int32)
    lengths = node.input[5]
    g.alter(lengths, lambda value, out: [helper.make_node("Sub", [value, "fault.shorter"], [out])])
    for added in reversed(steps):
        g.main.node.insert(0, added)


def _past_is_there(g: Graph, out: str, dtype: type = np.int64) -> list[onnx.NodeProto]:
    """Nodes that make [1] of 1 where something is cached, and of 0 in a prefill: the mask is longer than the ids."""
    one = g.constant(np.array([1], np.int64))
    return [
        helper.make_node("Shape", ["attention_mask"], [f"{out}.total"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], [f"{out}.new"], start=1, end=2),
        helper.make_node("Sub", [f"{out}.total", f"{out}.new"], [f"{out}.past"]),
        helper.make_node("Min", [f"{out}.past", one], [f"{out}.any"]),
        helper.make_node("Cast", [f"{out}.any"], [out], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
    ]


def stretch_cached_keys_of_one_head(g: Graph) -> None:
    name = f"{_PAST}{g.at.layer}.key"
    factors = np.ones((1, g.config.num_key_value_heads, 1, 1))
    factors[0, g.at.head] = 1.01
    by = g.number(factors, g.elements(name))
    g.alter(name, lambda value, out: [helper.make_node("Mul", [value, by], [out])])


def mix_rows_of_the_cache(g: Graph) -> None:
    """Row 1 of a batch reads row 0's keys and values, in every layer."""
    zero, one = (g.constant(np.array(number, np.int64)) for number in (0, 1))
    squeezed = g.constant(np.array([0], np.int64))
    for name in g.past():
        g.alter(
            name,
            lambda value, out: [
                helper.make_node("Shape", [value], [f"{out}.shape"], start=0, end=1),
                helper.make_node("Squeeze", [f"{out}.shape", squeezed], [f"{out}.batch"]),
                helper.make_node("Range", [zero, f"{out}.batch", one], [f"{out}.rows"]),
                helper.make_node("Equal", [f"{out}.rows", one], [f"{out}.second"]),
                helper.make_node("Where", [f"{out}.second", zero, f"{out}.rows"], [f"{out}.taken"]),
                helper.make_node("Gather", [value, f"{out}.taken"], [out], axis=0),
            ],
        )


def take_the_wrong_pad_side(g: Graph) -> None:
    """The mask is read from its end, as if padding were at the right; its shape is what it was."""
    bounds = [g.constant(np.array([number], np.int64)) for number in (-1, -(10**9), 1, -1)]
    g.alter("attention_mask", lambda value, out: [helper.make_node("Slice", [value, *bounds], [out])])


def read_padding(g: Graph) -> None:
    """Padding is masked nowhere."""
    one = g.constant(np.array([1], np.int64))
    g.alter("attention_mask", lambda value, out: [helper.make_node("Max", [value, one], [out])])


def shift_positions_of_steps(g: Graph) -> None:
    """Positions are one too large wherever something is cached."""
    known = {value.name for value in g.main.input} | {name for node in g.main.node for name in node.output}
    if "position_ids" not in known:
        raise Inexpressible("no value is called position_ids")
    steps = _past_is_there(g, "fault.later")
    g.alter("position_ids", lambda value, out: [helper.make_node("Add", [value, "fault.later"], [out])])
    for added in reversed(steps):
        g.main.node.insert(0, added)


# The table.
