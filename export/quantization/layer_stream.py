"""Hidden states on their way through one layer, run by plain transformers.

A stream stops where all that is wanted of it has been read. What attention gave until then is kept, and what the
experts give may come from the caller: so whoever has computed both need not have them computed again to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dense2moe.upcycle.gates.routes import Routes

_BATCH_ROWS = 8


@dataclass(frozen=True)
class Passed:
    """A layer of the float model that its stream has passed.

    The states behind it [N, S, H], and what its blocks read, [tokens, width] each.
    """

    layer: int
    after: torch.Tensor
    read: dict[str, torch.Tensor]


@dataclass
class ExpertsRead:
    """A layer's experts in the quantized stream.

    What they read [tokens, H], and how it is routed by `router`. By expert what its last matrix reads, until that one
    is replaced too, and then what it gives, [visits, width] each.
    """

    read: torch.Tensor
    router: torch.Tensor
    routes: Routes
    inner: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


class _EnoughError(Exception):
    """Every wanted input is caught; nothing more need be computed."""


class LayerStream:
    """States [N, S, H] before a model of one layer.

    Its blocks are "attention" and "attended", which are attention's first matrices and its last, "residual", the norm
    before the FFN, and "ffn".
    """

    def __init__(self, model: PreTrainedModel, states: torch.Tensor) -> None:
        self.model, self.states = model, states
        self._layer = layer = model.get_submodule("layers").get_submodule("0")
        sparse: Any = next((module for module in layer.modules() if hasattr(module, "experts")), None)
        self._attention, self._experts = layer.get_submodule("self_attn"), None if sparse is None else sparse.experts
        self._blocks = {
            "attention": self._attention.get_submodule("q_proj"),
            "attended": self._attention.get_submodule("o_proj"),
            "residual": layer.get_submodule("post_attention_layernorm"),
            "ffn": layer.get_submodule("mlp") if sparse is None else sparse,
        }
        self._attended: list[Any] = []

    def read(self, *wanted: str) -> dict[str, torch.Tensor]:
        """Read what blocks read, [tokens, width] each, in the order of computation.

        Nothing behind the last of them is computed. Behind attention, what it gave is kept.
        """
        self._attended = []
        with self._hooked(self._attention.register_forward_hook(lambda _, __, given: self._attended.append(given))):
            return self._run(wanted, stop=True)[1]

    def finish(self, *wanted: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the layer; its output states, and the inputs of blocks."""
        return self._run(wanted, stop=False)

    def go_on(self, experts: torch.Tensor | None) -> torch.Tensor:
        """The states behind the layer, from where `read` stopped at its FFN.

        Its experts give `experts` [tokens, H]; None of a layer without any.
        """
        attended = iter(self._attended)
        with _computed(self._attention, lambda: next(attended)):
            if experts is None:
                return self._run((), stop=False)[0]
            assert self._experts is not None, "outputs of experts in a layer without any"
            parts = iter(experts.split(_BATCH_ROWS * self.states.shape[1]))
            with _computed(self._experts, lambda: next(parts)):
                return self._run((), stop=False)[0]

    def put(self, tensors: Mapping[str, torch.Tensor], layer: int) -> None:
        """Load the layer's tensors by their names in the checkpoint.

        Stacked experts, which have other names in the model, are left alone.
        """
        own = dict(self._layer.named_parameters())
        for name, tensor in tensors.items():
            if (place := name.removeprefix(f"model.layers.{layer}.")) in own:
                own[place].data.copy_(tensor.reshape(own[place].shape))

    @torch.no_grad()
    def _run(self, wanted: tuple[str, ...], stop: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        caught: dict[str, list[torch.Tensor]] = {place: [] for place in wanted}

        def keep(place: str) -> Callable[..., None]:
            def hook(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                caught[place].append(_first(arguments, keywords).flatten(0, -2))
                if stop and place == wanted[-1]:
                    raise _EnoughError

            return hook

        handles = [self._blocks[place].register_forward_pre_hook(keep(place), with_kwargs=True) for place in wanted]
        after = []
        with self._hooked(*handles):
            for part in self.states.split(_BATCH_ROWS):
                try:
                    after.append(self.model(inputs_embeds=part, use_cache=False).last_hidden_state)
                except _EnoughError:
                    after.append(part)
        return torch.cat(after), {place: torch.cat(parts) for place, parts in caught.items()}

    @staticmethod
    @contextmanager
    def _hooked(*handles: Any) -> Iterator[None]:
        """Within the `with`, hooks are registered."""
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _computed(module: nn.Module, give: Callable[[], Any]) -> Iterator[None]:
    """Within the `with`, a module returns a known output."""
    module.forward = lambda *_, **__: give()
    try:
        yield
    finally:
        del module.forward


def _first(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states passed to a module."""
    found = arguments[0] if arguments else keywords["hidden_states"]
    assert isinstance(found, torch.Tensor)
    return found
