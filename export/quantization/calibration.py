"""Calibration inputs of every matrix of a decoder, layer by layer.

Two streams of hidden states walk through the layers: that of the float model, and that of the model as it is quantized
so far, every matrix of a layer in the order in which it computes. So a matrix can make up for the errors of all before
it: it is to give, for what it reads now, what it gave in the float model (GPTAQ, Li et al., 2025, section 3), and the
last matrix of a block is to close the distance between the two streams as well. An expert sees the tokens that its
router sends to it, or all of them where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.quantization.ffn import FfnPlaces, RowNumbers, RowSpan, compute_inner, find_places, multiply
from dense2moe.export.quantization.inputs import Inputs, Scaled
from dense2moe.export.quantization.layer_stream import ExpertsRead, LayerStream, Passed
from dense2moe.export.quantization.router_correction import RouterFacts, correct_router
from dense2moe.upcycle.checkpoints.layerwise import apply_final_norm, embed, load_layer
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import read_rows
from dense2moe.upcycle.gates.routes import Routes, route
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import ATTENTION, QUERY_KEY_VALUE, Ffn, layer_of, matches


@dataclass(frozen=True)
class Group:
    """Matrices with the same inputs.

    Names of tensors, and their rows where experts are stacked in one; the expert's number, if it is one.

    place: attention's query, key and value, its output; the first matrices of an FFN, or its last; the output head.
    ffn: where the tensors of a last matrix's FFN lie.
    """

    place: Literal["attention", "output", "first", "last", "head"]
    matrices: tuple[RowNumbers, ...]
    read: Callable[[], Inputs]
    expert: int | None = None
    ffn: FfnPlaces | None = None


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
        self.routers: dict[int, tuple[torch.Tensor, RouterFacts]] = {}
        self._scaled = Scaled()
        self._replaced: dict[tuple[str, RowSpan], torch.Tensor] = {}
        self._passed: Passed | None = None
        self._read: tuple[int, LayerStream] | None = None  # of the quantized stream, up to the FFN
        self._experts: ExpertsRead | None = None

    def replace(self, name: str, rows: RowSpan, weight: torch.Tensor) -> None:
        """Replace a matrix for the following groups of this layer."""
        self._replaced[name, rows] = weight
        if self._experts is not None and self.family.routed is not None:
            for expert in self._experts.inner:
                places = self._find(self.family.routed, layer_of(name), expert)
                if places.last == (name, rows):
                    inner = self._experts.inner.pop(expert)
                    self._experts.outputs[expert] = multiply(inner, weight, self._read_bias(places.last_biases))
                    break

    def read_float(
        self, layer: int, num_tokens: int | None = None, scaled: Scaled | None = None, moves: bool = False
    ) -> Iterator[Group]:
        """Groups of the next layer in the float model only.

        About `num_tokens` tokens are read. `scaled` is as for `read_layer`. Where it `moves`, both streams are those of
        the float model behind the layer; else nothing moves on.
        """
        self._scaled, self._replaced = scaled or Scaled(), {}
        rows, size, _ = self.reference_states.shape
        passed = self._pass(layer)
        count = rows if num_tokens is None else math.ceil(num_tokens / size)

        def read(block: str, place: str) -> Inputs:
            some = choose_blocks(passed.read[block].unflatten(0, (rows, size)), count).flatten(0, 1)
            found = self._scaled.divide(some, place)
            return Inputs(found, found)

        if moves:
            self.states = self.reference_states = passed.after
        yield self._read_attention(layer, read("attention", "attention"))
        yield self._read_output(layer, read("attended", "output"))
        routed = read("ffn", "first")
        if self.family.has_experts(layer, self.checkpoint.entries):
            yield from self._read_experts(layer, routed, self.read(self._router(layer)))
        yield from self._read_others(layer, routed, routed)

    def read_layer(self, layer: int, scaled: Scaled | None = None, attention_learns: bool = True) -> Iterator[Group]:
        """Groups of the next layer, in the order of computation.

        Experts come in order. Each is behind what `replace` was told of. Where attention does not learn, its groups are
        those of the float model.
        """
        self._scaled, self._replaced = scaled or Scaled(), {}
        drift = self._drift(self.states.flatten(0, -2), self.reference_states.flatten(0, -2))
        passed = self._pass(layer)
        self.reference_states, self._passed, reference = passed.after, None, passed.read
        del passed
        stream = LayerStream(load_layer(self.checkpoint, layer, torch.float32, self._scaled.tensors), self.states)
        true = self._scaled.divide(reference.pop("attention"), "attention")
        read = stream.read("attention")["attention"] if attention_learns else true
        yield self._read_attention(layer, Inputs(read, true))
        self._put(stream, layer)
        true = self._scaled.divide(reference.pop("attended"), "output")
        read = stream.read("attended")["attended"] if attention_learns else true
        yield self._read_output(layer, Inputs(read, true, drift if attention_learns else None))
        del read, true
        self._put(stream, layer)
        caught = stream.read("residual", "ffn")
        self._read, self._experts = (layer, stream), None
        routed = Inputs(
            caught["ffn"],
            self._scaled.divide(reference.pop("ffn"), "first"),
            self._drift(caught["residual"], reference.pop("residual")),
        )
        if self.family.has_experts(layer, self.checkpoint.entries):
            router = self.read(self._router(layer))
            if self.correct_routers:
                routing = self.family.gate(self.checkpoint.config)
                self.routers[layer] = correct_router(router, routed, routing, self._selection_bias(layer))
                router, _ = self.routers[layer]
            self._experts = ExpertsRead(routed.actual, router, self._route(layer, routed.actual, router))
            yield from self._read_experts(layer, routed, router)
        yield from self._read_others(layer, routed, replace(routed, drift=None))

    def pass_float(self, layer: int) -> None:
        """Advance past the layer in the float model, without reading it."""
        self.states = self.reference_states = self._pass(layer).after

    def _pass(self, layer: int) -> Passed:
        """The float model's stream through the next layer."""
        if self._passed is None or self._passed.layer != layer:
            stream = LayerStream(load_layer(self.checkpoint, layer, torch.float32), self.reference_states)
            self._passed = Passed(layer, *stream.finish("attention", "attended", "residual", "ffn"))
        return self._passed

    def read_head(self, name: str) -> Group:
        """The matrix that makes logits, `name`, after the last layer."""
        self._scaled, self._replaced = Scaled(), {}
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

    def _put(self, stream: LayerStream, layer: int) -> None:
        """Give the stream attention's matrices in their present state."""
        names = [self.family.name(part, layer) for part in ATTENTION]
        stream.put({name: self._replaced[name, None] for name in names if (name, None) in self._replaced}, layer)

    def advance(self, layer: int, replaced: Mapping[str, torch.Tensor]) -> None:
        """Advance past `layer` with these tensors substituted.

        What the groups were read behind is not computed again, where it was replaced by the same tensors.
        """
        if self._read is None or self._read[0] != layer:
            self._scaled, self._replaced = Scaled(), {}
            self.reference_states, self._passed = self._pass(layer).after, None
            self._experts = None
        if self._read is None or self._read[0] != layer or not self._is_behind(layer, replaced):
            tensors = {**self._scaled.tensors, **replaced}
            stream = LayerStream(load_layer(self.checkpoint, layer, torch.float32, tensors), self.states)
            read = stream.read("residual", "ffn")["ffn"]
            self._experts = None
        else:
            _, stream = self._read
            stream.put(replaced, layer)
            read = torch.empty(0) if self._experts is None else self._experts.read
        has_experts = self.family.has_experts(layer, self.checkpoint.entries)
        self.states = stream.go_on(self._sum_experts(layer, read, replaced) if has_experts else None)
        self._read = self._experts = None

    def _is_behind(self, layer: int, replaced: Mapping[str, torch.Tensor]) -> bool:
        """Whether the layer's FFN was read behind these tensors."""
        ffns = [ffn for ffn in (self.family.routed, self.family.shared, self.family.ffn) if ffn is not None]
        patterns = [name for ffn in ffns for name in ffn.names]
        known = {name: tensor for (name, rows), tensor in self._replaced.items() if rows is None}
        known = {**self._scaled.tensors, **known}
        return all(
            name == self.family.find("router", layer)
            or any(matches(pattern, name) for pattern in patterns)
            or (name in known and torch.equal(known[name].flatten(), tensor.flatten()))
            for name, tensor in replaced.items()
        )

    def _sum_experts(self, layer: int, read: torch.Tensor, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The experts' summed output [tokens, H] for inputs [tokens, H]."""
        assert self.family.routed is not None
        name = self._router(layer)
        router = replaced[name].float() if name in replaced else self.read(name)
        experts = self._experts
        if experts is None or not torch.equal(experts.router, router):
            experts = ExpertsRead(read, router, self._route(layer, read, router))
        total, routes = torch.zeros_like(read), experts.routes
        for expert in range(self.family.gate(self.checkpoint.config).num_experts):
            visits = routes.expert == expert
            places = self._find(self.family.routed, layer, expert)
            parts = (*places.first, places.last)
            matrices = [self._take(part, replaced) for part in parts]
            if expert in experts.outputs and all(
                torch.equal(self._replaced[part], matrix) for part, matrix in zip(parts, matrices, strict=True)
            ):
                outputs = experts.outputs[expert]
            else:
                inner = self._compute_inner(read[routes.token[visits]], places, matrices[:-1])
                outputs = multiply(inner, matrices[-1], self._read_bias(places.last_biases))
            total.index_add_(0, routes.token[visits], outputs * routes.weight[visits, None])
        return total

    def _take(self, part: RowNumbers, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
        name, rows = part
        if name not in replaced:
            return self.read_matrix(name, rows)
        whole = replaced[name].flatten(0, -2)
        return whole if rows is None else whole[slice(*rows)]

    def _route(self, layer: int, read: torch.Tensor, router: torch.Tensor) -> Routes:
        return route(read @ router.T, self.family.gate(self.checkpoint.config), self._selection_bias(layer))

    def _read_experts(self, layer: int, inputs: Inputs, router: torch.Tensor) -> Iterator[Group]:
        assert self.family.routed is not None
        routing = self.family.gate(self.checkpoint.config)
        routes = self._route(layer, inputs.actual, router)
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
        """Matrices of one FFN, which may be stacked with others."""
        places = self._find(ffn, layer, expert)
        yield Group("first", places.first, lambda: replace(read(), drift=None), expert)

        def read_inner() -> Inputs:
            inputs, experts = read(), self._experts
            present = [
                self._replaced[part] if part in self._replaced else self.read_matrix(*part) for part in places.first
            ]
            actual = self._compute_inner(inputs.actual, places, present)
            is_present = not self.all_experts and all(part in self._replaced for part in places.first)
            if experts is not None and expert is not None and is_present:
                experts.inner[expert] = actual
            if inputs.is_float and not self._replaced:
                return replace(inputs, actual=actual, reference=actual)
            true = self._compute_inner(inputs.reference, places, [self.read_matrix(*part) for part in places.first])
            return replace(inputs, actual=actual, reference=true)

        yield Group("last", (places.last,), read_inner, expert, places)

    def _find(self, ffn: Ffn, layer: int, expert: int | None) -> FfnPlaces:
        return find_places(self.family, self.checkpoint.entries, ffn, layer, expert)

    def _compute_inner(self, x: torch.Tensor, places: FfnPlaces, first: Sequence[torch.Tensor]) -> torch.Tensor:
        """The input of an FFN's last matrix, for FFN inputs [tokens, H]."""
        bias = self._read_bias(places.first_biases)
        return compute_inner(x, first, bias, places.is_gated, self.checkpoint.config.hidden_act)

    def _read_bias(self, places: Sequence[RowNumbers]) -> torch.Tensor | None:
        """Biases below each other, in their present state; None without any."""
        if not places:
            return None
        return torch.cat([self.read(name)[slice(*rows) if rows else slice(None)].flatten() for name, rows in places])

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the layer in float32, in its present state."""
        return (self._scaled.tensors[name] if name in self._scaled.tensors else self.checkpoint.read(name)).float()

    def read_matrix(self, name: str, rows: RowSpan) -> torch.Tensor:
        """A matrix of the layer in float32, before quantization.

        Leading dimensions count as rows.
        """
        if name in self._scaled.tensors:
            whole = self._scaled.tensors[name].flatten(0, -2)
            return whole if rows is None else whole[slice(*rows)]
        entry = self.checkpoint.entries[name]
        flat = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
        return read_rows(flat, *(rows or (0, flat.shape[0]))).float()

    def _has_elements(self, name: str) -> bool:
        return name in self.checkpoint.entries and self.checkpoint.entries[name].num_elements > 0


def _same(inputs: Inputs) -> Inputs:
    return inputs
