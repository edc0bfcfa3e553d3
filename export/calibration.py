"""What every matrix of a decoder reads on calibration text, one layer in memory at a time.

Layers are walked in order. What a layer reads comes from the layers before it as they were quantized, so that a later one can make up for errors of
an earlier one (GPTQ, 2023, section 3). An expert sees the tokens that its router sends to it, or all of them where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from export.family import DecoderFamily, GatedFfn
from upcycle.checkpoint import Checkpoint, read_rows
from upcycle.layerwise import embed, load_layer

_BATCH_ROWS = 8

Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Group:
    """Matrices that read the same inputs: names of tensors, and their rows where experts are stacked in one; the expert's number, if it is one.

    `read` gives the inputs [tokens, K], float32.
    """

    matrices: tuple[tuple[str, Rows], ...]
    read: Callable[[], torch.Tensor]
    expert: int | None = None


class CalibrationWalk:
    """A walk through the layers of a mixture-of-experts decoder on blocks of token ids [N, S]."""

    def __init__(self, checkpoint: Checkpoint, family: DecoderFamily, blocks: torch.Tensor, all_experts: bool) -> None:
        self.checkpoint, self.family, self.all_experts = checkpoint, family, all_experts
        self.states = embed(checkpoint, blocks, torch.float32)

    def read_layer(self, layer: int) -> Iterator[Group]:
        """The groups of the layer that is next, experts in order; inputs are made when a group is read."""
        caught = self._run(load_layer(self.checkpoint, layer, torch.float32), catch=True)
        a = self.family.attention
        yield Group(tuple((name.format(layer=layer), None) for name in (a.query, a.key, a.value)), lambda: caught["attention"])
        yield Group(((a.output.format(layer=layer), None),), lambda: caught["attended"])
        if self.family.has_experts(layer, self.checkpoint.entries):
            yield from self._read_experts(layer, caught["ffn"])
        elif self.family.dense is not None:
            yield from self._read_ffn(self.family.dense, layer, lambda: caught["ffn"], None)
        shared = self.family.shared
        if shared is not None and self._has_elements(shared.ffn.up.format(layer=layer)):
            yield from self._read_ffn(shared.ffn, layer, lambda: caught["ffn"], None)

    def advance(self, layer: int, replaced: Mapping[str, torch.Tensor]) -> None:
        """Go on behind the layer, as it computes with tensors in the place of its own."""
        self._run(load_layer(self.checkpoint, layer, torch.float32, replaced), catch=False)

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, catch: bool) -> dict[str, torch.Tensor]:
        """Run all text through one layer: with `catch` returns what its blocks read, [tokens, width] each, or else moves on behind it."""
        layer = model.get_submodule("layers.0")
        sparse = next((module for module in layer.modules() if hasattr(module, "experts")), None)
        ffn = layer.get_submodule("mlp") if sparse is None else sparse
        places = {"attention": layer.get_submodule("self_attn.q_proj"), "attended": layer.get_submodule("self_attn.o_proj"), "ffn": ffn}
        caught: dict[str, list[torch.Tensor]] = {place: [] for place in places}

        def keep(into: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _, arguments, keywords: into.append(_first(arguments, keywords).flatten(0, -2))

        if catch:
            for place, module in places.items():
                module.register_forward_pre_hook(keep(caught[place]), with_kwargs=True)
        after = [model(inputs_embeds=part, use_cache=False).last_hidden_state for part in self.states.split(_BATCH_ROWS)]
        if not catch:
            self.states = torch.cat(after)
            return {}
        return {place: torch.cat(parts) for place, parts in caught.items()}

    def _read_experts(self, layer: int, x: torch.Tensor) -> Iterator[Group]:
        assert self.family.router is not None
        assert self.family.routing is not None
        assert self.family.experts is not None
        routing = self.family.routing(self.checkpoint.config)
        logits = x @ self.checkpoint.read(self.family.router.format(layer=layer)).float().T
        chosen = logits.topk(routing.num_experts_per_tok, dim=-1).indices
        for expert in range(routing.num_experts):
            own = x if self.all_experts else x[(chosen == expert).any(-1)]
            yield from self._read_ffn(self.family.experts, layer, partial(_same, own), expert)

    def _read_ffn(self, ffn: GatedFfn, layer: int, read: Callable[[], torch.Tensor], expert: int | None) -> Iterator[Group]:
        """The matrices of one gated FFN, which may be one of several that are stacked in its tensors."""
        up, down = (name.format(layer=layer, expert=expert) for name in (ffn.up, ffn.down))
        if ffn.gate is not None:
            gate = ffn.gate.format(layer=layer, expert=expert)
            first: tuple[tuple[str, Rows], ...] = ((gate, None), (up, None))
            second: Rows = None
        else:
            *_, height, _ = self.checkpoint.entries[up].shape
            *_, hidden, _ = self.checkpoint.entries[down].shape
            first = ((up, None if expert is None else (height * expert, height * (expert + 1))),)
            second = None if expert is None else (hidden * expert, hidden * (expert + 1))
        yield Group(first, read, expert)

        def inner() -> torch.Tensor:
            both = torch.cat([self.read_matrix(name, rows) for name, rows in first])
            gate_rows, up_rows = (read() @ both.T).chunk(2, dim=-1)
            activation: Any = ACT2FN[self.checkpoint.config.hidden_act]
            result: torch.Tensor = activation(gate_rows) * up_rows
            return result

        yield Group(((down, second),), inner, expert)

    def read_matrix(self, name: str, rows: Rows) -> torch.Tensor:
        """A matrix of the checkpoint in float32: all dimensions but the last count as rows."""
        entry = self.checkpoint.entries[name]
        flat = replace(entry, shape=(math.prod(entry.shape[:-1]), entry.shape[-1]))
        return read_rows(flat, *(rows or (0, flat.shape[0]))).float()

    def _has_elements(self, name: str) -> bool:
        return name in self.checkpoint.entries and self.checkpoint.entries[name].num_elements > 0


def _same(inputs: torch.Tensor) -> torch.Tensor:
    return inputs


def _first(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a module was called with."""
    found = arguments[0] if arguments else keywords["hidden_states"]
    assert isinstance(found, torch.Tensor)
    return found
