"""Visible places inside a package's graph, and their values.

Graphs that we build keep the names of these values (`dense2moe.export.graph.decoder`); a traced one has residual
streams and router logits alone, and one of other makers none. A place that a graph does not show is not judged by
itself: what it computes is judged with the next one behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch

from dense2moe.export import names as value_names
from dense2moe.export.parity.place import OUTSIDE, Place, PlacePart
from dense2moe.export.runtime.decoder import Decoder


@dataclass(frozen=True)
class Taps:
    """Names of a graph's values by place, and its number of layers.

    What stands behind a norm or factor is the block's own output. A place may have several values, which stand side by
    side. `routers`: of router logits those that experts are chosen by in the graph, and can be added to, for so many
    experts.
    """

    names: Mapping[Place, tuple[str, ...]]
    num_layers: int
    routers: tuple[str, ...] = ()
    num_experts: int = 0

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all places."""
        return tuple(dict.fromkeys(name for names in self.names.values() for name in names))

    def by_layer(self, part: PlacePart) -> list[tuple[int, str]]:
        """Layers that show a part, and its name there."""
        return [(layer, names[0]) for (layer, own), names in self.names.items() if own == part]

    def of_layers(self, parts: Sequence[PlacePart]) -> tuple[str, ...]:
        """Names of these parts in all layers."""
        return tuple(name for (_, part), names in self.names.items() if part in parts for name in names)


def find_taps(model: onnx.ModelProto, shared_outside: bool = False) -> Taps:
    """A graph's places, by the names that our builder gives them.

    `shared_outside`: in the reference a shared expert stands beside the block of experts, so its part is left out here
    too.
    """
    makers = {name: node for node in model.graph.node for name in node.output if name}
    num_layers = value_names.count_layers(value.name for value in model.graph.input)
    names: dict[Place, tuple[str, ...]] = {}

    def add(place: Place, *candidates: str) -> None:
        if (found := next((name for name in candidates if name in makers), None)) is not None:
            names[place] = (found,)

    embedded = value_names.EMBEDDED
    add((OUTSIDE, "embedding"), value_names.ENTERED, embedded + value_names.MULTIPLIED, embedded)
    for n in range(num_layers):
        add((n, "attention norm"), value_names.attention_normed(n))
        add((n, "query, key and value"), value_names.query_key_value(n))
        add((n, "attention"), value_names.attention(n))
        add((n, "attention output"), value_names.attention_output(n))
        add((n, "FFN norm"), value_names.ffn_normed(n), value_names.attended(n))
        add((n, "router"), value_names.router_logits(n))
        add((n, "residual stream"), value_names.hidden(n))
        joined = makers.get(value_names.hidden(n))
        if joined is not None and len(joined.input) > 1 and (n, "attention output") in names:
            update = _block_output(makers, joined.input[1], shared_outside)
            if update in makers:
                names[n, "experts" if (n, "router") in names else "FFN"] = (update,)
    add((OUTSIDE, "final norm"), value_names.FINAL_NORMED)
    read = {name for node in model.graph.node for name in (*node.input, *_inner_reads(node))}
    routers = [
        name
        for (_, part), (name, *_) in names.items()
        if part == "router" and name in read and makers[name].op_type == "MatMul"
    ]
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    num_experts = next(
        (shapes[name][-1] for router in routers[:1] for name in makers[router].input if name in shapes), 0
    )
    return Taps(names, num_layers, tuple(routers) if num_experts else (), num_experts)


def _inner_reads(node: onnx.NodeProto) -> list[str]:
    """Inputs of the nodes in a node's branches."""
    return [
        name
        for attribute in node.attribute
        if attribute.HasField("g")
        for inner in attribute.g.node
        for name in inner.input
    ]


def _block_output(makers: Mapping[str, onnx.NodeProto], update: str, shared_outside: bool) -> str:
    """A block's output before any norm, factor or shared expert."""
    while update.endswith((value_names.MULTIPLIED, value_names.NORMED)):
        update = makers[update].input[0]
    return makers[update].input[0] if shared_outside and value_names.is_mixed(update) else update


@dataclass(frozen=True)
class Seen:
    """A package fed once.

    Ids and mask [B, S], how many of them at once, and what it showed, float32 [B, S, ...] by name. `nudge` [T, E] or
    [1, E]: what was added to the router logits of every layer, tokens of all rows one after the other. `cache`: by
    layer keys and values [B, heads, S, head_dim] as the graph gave them back. `logits` are of the last tokens.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    num_prefill: int
    logits: torch.Tensor
    values: Mapping[str, torch.Tensor]
    cache: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    nudge: torch.Tensor | None = None

    def of_rows(self, count: int) -> Seen:
        """The first rows only, without the cache."""
        return Seen(
            self.ids[:count],
            self.mask[:count],
            self.num_prefill,
            self.logits[:count],
            {n: v[:count] for n, v in self.values.items()},
        )


@dataclass(frozen=True)
class FedText:
    """Ids and mask [B, S], and how they are fed.

    A prefill of `num_prefill` tokens, then one token at a time. Of a whole prefill the last `num_logits` tokens have
    logits, all where it is 0; else the last one alone has.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    num_prefill: int
    num_logits: int = 0

    @classmethod
    def whole(cls, ids: torch.Tensor) -> FedText:
        """Rows without padding, in one prefill."""
        return cls(ids, torch.ones_like(ids), ids.shape[1])


def look(
    decoder: Decoder,
    text: FedText,
    names: Sequence[str] = (),
    nudge: torch.Tensor | None = None,
    with_cache: bool = False,
) -> Seen:
    """Feed a text, and return shown values by name.

    `nudge` [B * S, E] is added to the router logits of every layer.
    """
    ids, mask, num_prefill, num_logits = text.ids, text.mask, text.num_prefill, text.num_logits
    cache = decoder.new_cache(len(ids), ids.shape[1], taps=names)
    kept = num_logits if num_prefill == ids.shape[1] else 1
    wide = None if nudge is None else nudge.view(len(ids), ids.shape[1], -1)

    def part(start: int, stop: int) -> torch.Tensor | None:
        return None if wide is None else wide[:, start:stop].flatten(0, 1)

    parts = [
        decoder.run(cache, ids[:, :num_prefill].numpy(), mask[:, :num_prefill].numpy(), kept, part(0, num_prefill))
    ]
    parts += [
        decoder.run(cache, ids[:, n : n + 1].numpy(), nudge=part(n, n + 1)) for n in range(num_prefill, ids.shape[1])
    ]

    def joined(name: str) -> torch.Tensor:
        pieces = [each.pop(name) for each in parts]
        pieces = [piece.reshape(len(ids), -1, piece.shape[-1]) for piece in pieces]
        return torch.from_numpy(np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0])

    values = {name: joined(name) for name in dict.fromkeys(names)}
    held = _read_cache(decoder.read_cache(cache), ids.shape[1]) if with_cache else {}
    return Seen(ids, mask, num_prefill, joined("logits"), values, held, nudge)


def _read_cache(buffers: Mapping[str, np.ndarray], length: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, buffer in buffers.items():
        state = value_names.parse_state(name)
        assert state is not None
        found.setdefault(state.layer, {})[state.kind] = torch.from_numpy(np.array(buffer[:, :, :length], np.float32))
    return {layer: (pair["key"], pair["value"]) for layer, pair in found.items()}
