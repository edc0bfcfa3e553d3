"""Calibration inputs of every matrix of a decoder, layer by layer.

Two streams of hidden states walk through the layers: that of the float model, and that of the model as it is quantized
so far, every matrix of a layer in the order in which it computes. So a matrix can make up for the errors of all before
it: it is to give, for what it reads now, what it gave in the float model (GPTAQ, Li et al., 2025, section 3), and the
last matrix of a block is to close the distance between the two streams as well. An expert sees the tokens that its
router sends to it, or all of them where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.quantization.inputs import Inputs
from dense2moe.export.quantization.router_correction import RouterFacts, correct_router
from dense2moe.upcycle.checkpoints.layerwise import apply_final_norm, embed, load_layer
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import read_rows
from dense2moe.upcycle.gates.routes import Routes, route
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import ATTENTION, QUERY_KEY_VALUE, Ffn

_BATCH_ROWS = 8
_BATCH_TOKENS = 1024
"""Of an FFN at once: what it makes of them fits into a cache."""

RowSpan = tuple[int, int] | None


@dataclass(frozen=True)
class Group:
    """Matrices with the same inputs.

    Names of tensors, and their rows where experts are stacked in one; the expert's number, if it is one.

    place: attention's query, key and value, its output; the first matrices of an FFN, or its last; the output head.
    up: where the rows are that make the inputs of a last matrix.
    """

    place: Literal["attention", "output", "first", "last", "head"]
    matrices: tuple[tuple[str, RowSpan], ...]
    read: Callable[[], Inputs]
    expert: int | None = None
    up: tuple[str, tuple[int, int]] | None = None


class _EnoughError(Exception):
    """Every wanted input is caught: the layer need not go on."""


class CalibrationWalk:
    """A walk through a decoder's layers on blocks [N, S].

    Blocks of token ids, in a mixture of experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Architecture,
        blocks: torch.Tensor,
        all_experts: bool,
        correct_routers: bool = False,
    ) -> None:
        self.checkpoint, self.family, self.all_experts, self.correct_routers = (
            checkpoint,
            family,
            all_experts,
            correct_routers,
        )
        self.states = self.reference_states = embed(checkpoint, blocks, torch.float32)
        self._num_read = 0
        self.routers: dict[int, tuple[torch.Tensor, RouterFacts]] = {}
        self._changed: Mapping[str, torch.Tensor] = {}
        self._replaced: dict[tuple[str, RowSpan], torch.Tensor] = {}

    def replace(self, name: str, rows: RowSpan, weight: torch.Tensor) -> None:
        """Replace a matrix for the following groups of this layer."""
        self._replaced[name, rows] = weight

    def read_float(
        self,
        layer: int,
        num_tokens: int | None = None,
        changed: Mapping[str, torch.Tensor] | None = None,
        moves: bool = False,
    ) -> Iterator[Group]:
        """Groups of the next layer in the float model only.

        About `num_tokens` tokens are read. `changed` is as for `read_layer`. Where it `moves`, both streams are those
        of the float model behind the layer; else nothing moves on.
        """
        self._changed, self._replaced = changed or {}, {}
        model = load_layer(self.checkpoint, layer, torch.float32, self._changed)
        count = (
            len(self.reference_states) if num_tokens is None else math.ceil(num_tokens / self.reference_states.shape[1])
        )
        after, caught = self._run(
            model, choose_blocks(self.reference_states, count), ("attention", "attended", "ffn"), stop=not moves
        )
        if moves:
            self.states = self.reference_states = after
        yield self._read_attention(layer, Inputs(caught["attention"], caught["attention"]))
        yield self._read_output(layer, Inputs(caught["attended"], caught["attended"]))
        routed = Inputs(caught["ffn"], caught["ffn"])
        if self.family.has_experts(layer, self.checkpoint.entries):
            yield from self._read_experts(layer, routed, self.read(self._router(layer)))
        yield from self._read_others(layer, routed, routed)

    def read_layer(
        self, layer: int, changed: Mapping[str, torch.Tensor] | None = None, attention_learns: bool = True
    ) -> Iterator[Group]:
        """Groups of the next layer, in the order of computation.

        Experts come in order. Each is behind what `replace` was told of. `changed` are tensors in the place of the
        checkpoint's with which the layer computes the same function. Where attention does not learn, its groups are
        those of the float model.
        """
        self._changed, self._replaced, self._num_read = changed or {}, {}, layer + 1
        model = load_layer(self.checkpoint, layer, torch.float32, self._changed)
        drift = self._drift(self.states.flatten(0, -2), self.reference_states.flatten(0, -2))
        before, places = self.reference_states, ("attention", "attended", "residual", "ffn")
        if self._changed:  # the states behind it are those of the layer as it is, to the bit
            self.reference_states, _ = self._run(
                load_layer(self.checkpoint, layer, torch.float32), before, (), stop=False
            )
            _, reference = self._run(model, before, places, stop=True)
        else:
            self.reference_states, reference = self._run(model, before, places, stop=False)
        true = reference.pop("attention")
        read = self._run(model, self.states, ("attention",), stop=True)[1]["attention"] if attention_learns else true
        yield self._read_attention(layer, Inputs(read, true))
        self._put(model, layer)
        true = reference.pop("attended")
        read = self._run(model, self.states, ("attended",), stop=True)[1]["attended"] if attention_learns else true
        yield self._read_output(layer, Inputs(read, true, drift if attention_learns else None))
        del read, true
        self._put(model, layer)
        _, caught = self._run(model, self.states, ("residual", "ffn"), stop=True)
        del model
        routed = Inputs(caught["ffn"], reference["ffn"], self._drift(caught["residual"], reference["residual"]))
        if self.family.has_experts(layer, self.checkpoint.entries):
            router = self.read(self._router(layer))
            if self.correct_routers:
                routing = self.family.gate(self.checkpoint.config)
                self.routers[layer] = correct_router(router, routed, routing, self._selection_bias(layer))
                router, _ = self.routers[layer]
            yield from self._read_experts(layer, routed, router)
        yield from self._read_others(layer, routed, replace(routed, drift=None))

    def pass_float(self, layer: int) -> None:
        """Advance past the layer in the float model, without reading it."""
        self._changed = {}
        after, _ = self._run(load_layer(self.checkpoint, layer, torch.float32), self.reference_states, (), stop=False)
        self.states = self.reference_states = after

    def read_head(self, name: str) -> Group:
        """The matrix that makes logits, `name`, after the last layer."""
        self._changed, self._replaced = {}, {}
        true = apply_final_norm(self.checkpoint, self.reference_states.flatten(0, -2), torch.float32)
        is_float = self.states is self.reference_states
        read = true if is_float else apply_final_norm(self.checkpoint, self.states.flatten(0, -2), torch.float32)
        return Group("head", ((name, None),), partial(_same, Inputs(read, true)))

    def _read_attention(self, layer: int, inputs: Inputs) -> Group:
        return Group(
            "attention",
            tuple((self.family.name(part, layer), None) for part in QUERY_KEY_VALUE),
            partial(_same, inputs),
        )

    def _read_output(self, layer: int, inputs: Inputs) -> Group:
        return Group("output", ((self.family.name("attention_output", layer), None),), partial(_same, inputs))

    def _read_others(self, layer: int, dense: Inputs, shared: Inputs) -> Iterator[Group]:
        """Groups of a dense FFN, or of one beside the experts."""
        if self.family.ffn is not None and not self.family.has_experts(layer, self.checkpoint.entries):
            yield from self._read_ffn(self.family.ffn, layer, partial(_same, dense), None)
        if self.family.shared is not None and self._has_elements(self.family.shared.up.format(layer=layer)):
            yield from self._read_ffn(self.family.shared, layer, partial(_same, shared), None)

    def _router(self, layer: int) -> str:
        return self.family.name("router", layer)

    def _selection_bias(self, layer: int) -> torch.Tensor | None:
        """The selection bias of a layer's router, float32 [E]."""
        name = self.family.find("selection_bias", layer)
        return None if name is None else self.read(name)

    def _drift(self, states: torch.Tensor, reference: torch.Tensor) -> torch.Tensor | None:
        """The correction that a block's outputs need.

        None where a norm stands between them and the residual stream.
        """
        if self.family.find("ffn_norm") is None:
            return None
        return (reference - states) / self.family.multipliers(self.checkpoint.config).residual

    def _put(self, model: PreTrainedModel, layer: int) -> None:
        """Give the model attention's matrices in their present state."""
        for part in ATTENTION:
            if (name := (self.family.name(part, layer), None)) in self._replaced:
                place = self.family.name(part, 0).removeprefix("model.")
                model.get_parameter(place).data.copy_(self._replaced[name])

    def advance(self, layer: int, replaced: Mapping[str, torch.Tensor]) -> None:
        """Advance past `layer` with these tensors substituted.

        The layer need not have been read.

        It may be one that was not read.
        """
        if self._num_read <= layer:
            self._changed = {}
            self.reference_states, _ = self._run(
                load_layer(self.checkpoint, layer, torch.float32), self.reference_states, (), stop=False
            )
        model = load_layer(self.checkpoint, layer, torch.float32, {**self._changed, **replaced})
        self.states, _ = self._run(model, self.states, (), stop=False)

    @torch.no_grad()
    def _run(
        self, model: PreTrainedModel, states: torch.Tensor, wanted: tuple[str, ...], stop: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run hidden states through one layer.

        Returns those behind it, and what the `wanted` blocks read, [tokens, width] each.
        With `stop` nothing is computed behind the last of them, and the states are as they were.
        """
        layer = model.get_submodule("layers").get_submodule("0")
        sparse = next((module for module in layer.modules() if hasattr(module, "experts")), None)
        ffn = layer.get_submodule("mlp") if sparse is None else sparse
        places = {
            "attention": layer.get_submodule("self_attn.q_proj"),
            "attended": layer.get_submodule("self_attn.o_proj"),
            "ffn": ffn,
        }
        # where it is a norm before the FFN; see `_drift`
        places["residual"] = layer.get_submodule("post_attention_layernorm")
        caught: dict[str, list[torch.Tensor]] = {place: [] for place in wanted}

        def keep(place: str) -> Callable[..., None]:
            def hook(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                caught[place].append(_first(arguments, keywords).flatten(0, -2))
                if stop and place == wanted[-1]:
                    raise _EnoughError

            return hook

        handles = [places[place].register_forward_pre_hook(keep(place), with_kwargs=True) for place in wanted]
        after = []
        for part in states.split(_BATCH_ROWS):
            try:
                after.append(model(inputs_embeds=part, use_cache=False).last_hidden_state)
            except _EnoughError:
                after.append(part)
        for handle in handles:
            handle.remove()
        return torch.cat(after), {place: torch.cat(parts) for place, parts in caught.items()}

    def _read_experts(self, layer: int, inputs: Inputs, router: torch.Tensor) -> Iterator[Group]:
        assert self.family.routed is not None
        routing = self.family.gate(self.checkpoint.config)
        logits = inputs.actual @ router.T
        routes = route(logits, routing, self._selection_bias(layer))
        _, weights = routes.as_table(routing.max_experts_per_token)
        total = torch.tensor(routing.scale) if routing.renormalize else weights.sum(-1, keepdim=True)
        for expert in range(routing.num_experts):
            yield from self._read_ffn(
                self.family.routed, layer, partial(self._visits_of, expert, inputs, routes, total), expert
            )

    def _visits_of(self, expert: int, inputs: Inputs, routes: Routes, total: torch.Tensor) -> Inputs:
        """One expert's share of its layer's inputs."""
        if self.all_experts:
            return replace(inputs, drift=None)
        visits = routes.expert == expert
        own = routes.token[visits]
        # Outputs that all have the drift over the sum of their weights have it together.
        drift = None if inputs.drift is None else inputs.drift[own] / (total if total.ndim == 0 else total[own])
        actual = inputs.actual[own]
        return Inputs(actual, actual if inputs.is_float else inputs.reference[own], drift, routes.weight[visits])

    def _read_ffn(self, ffn: Ffn, layer: int, read: Callable[[], Inputs], expert: int | None) -> Iterator[Group]:
        """Matrices of one gated FFN, which may be stacked with others."""
        up, down = (name.format(layer=layer, expert=expert) for name in (ffn.up, ffn.down))
        if ffn.gate is not None:
            gate = ffn.gate.format(layer=layer, expert=expert)
            first: tuple[tuple[str, RowSpan], ...] = ((gate, None), (up, None))
            second: RowSpan = None
        else:
            *_, height, _ = self.checkpoint.entries[up].shape
            *_, hidden, _ = self.checkpoint.entries[down].shape
            first = ((up, None if expert is None else (height * expert, height * (expert + 1))),)
            second = None if expert is None else (hidden * expert, hidden * (expert + 1))
        yield Group("first", first, lambda: replace(read(), drift=None), expert)

        def inner(x: torch.Tensor, replaced: Mapping[tuple[str, RowSpan], torch.Tensor]) -> torch.Tensor:
            both = torch.cat([replaced[part] if part in replaced else self.read_matrix(*part) for part in first]).T
            activation: Any = ACT2FN[self.checkpoint.config.hidden_act]
            result = x.new_empty(len(x), both.shape[1] // 2)
            for some, place in zip(x.split(_BATCH_TOKENS), result.split(_BATCH_TOKENS), strict=True):
                gate_rows, up_rows = (some @ both).chunk(2, dim=-1)
                torch.mul(activation(gate_rows), up_rows, out=place)
            return result

        def read_inner() -> Inputs:
            inputs = read()
            actual = inner(inputs.actual, self._replaced)
            same = inputs.is_float and not self._replaced
            return replace(inputs, actual=actual, reference=actual if same else inner(inputs.reference, {}))

        up_rows = self._up_rows(*first[-1], stacked=ffn.gate is None)
        yield Group("last", ((down, second),), read_inner, expert, (first[-1][0], up_rows))

    def _up_rows(self, name: str, rows: RowSpan, stacked: bool) -> tuple[int, int]:
        """The rows of up in its tensor.

        The gate's rows may precede them.
        """
        start, stop = rows or (0, math.prod(self.checkpoint.entries[name].shape[:-1]))
        return ((start + stop) // 2 if stacked else start), stop

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the layer in float32, in its present state."""
        return (self._changed[name] if name in self._changed else self.checkpoint.read(name)).float()

    def read_matrix(self, name: str, rows: RowSpan) -> torch.Tensor:
        """A matrix of the layer in float32, before quantization.

        Leading dimensions count as rows.
        """
        if name in self._changed:
            whole = self._changed[name].flatten(0, -2)
            return whole if rows is None else whole[slice(*rows)]
        entry = self.checkpoint.entries[name]
        flat = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
        return read_rows(flat, *(rows or (0, flat.shape[0]))).float()

    def _has_elements(self, name: str) -> bool:
        return name in self.checkpoint.entries and self.checkpoint.entries[name].num_elements > 0


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _first(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states passed to a module."""
    found = arguments[0] if arguments else keywords["hidden_states"]
    assert isinstance(found, torch.Tensor)
    return found
