"""One forward pass with inner values, by torch and by the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from dense2moe.export import names
from dense2moe.export.coverage import find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.footprint import LOGITS_BYTES, PARITY_BATCH
from dense2moe.export.parity.experts_on_disk import leave_experts_on_disk
from dense2moe.export.parity.taps import FedText, Seen, look
from dense2moe.export.quantization.simulation import RoundedInputs
from dense2moe.export.quantization.twin import SCHEME_NAME, Twin
from dense2moe.export.rotary import rotary_switch
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.checkpoints.loading import load_whole
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.gate import Choice, Gate
from dense2moe.upcycle.gates.scores import selection_scores
from dense2moe.upcycle.memory import small_heap
from dense2moe.upcycle.models.routing import assume_gate, find_gate

BATCH = PARITY_BATCH


@dataclass(frozen=True)
class Forward:
    """One forward pass over ids [B, S]: logits and inner values.

    Logits [B, L, V] of the last L tokens, by layer selection scores and residual stream, and the choice. Selection
    scores [B, S, E] are what experts are chosen by: router logits, or scores plus a bias. A traced package shows no
    more than the logits. A layer's residual stream is [B, S, H]. A layer without experts has None for selection scores,
    one that does not show its attention's output [B, S, H] None for that. A package that shows no residual streams has
    no layers here at all.
    """

    logits: torch.Tensor
    routers: tuple[torch.Tensor | None, ...]
    hiddens: tuple[torch.Tensor, ...]
    attended: tuple[torch.Tensor | None, ...]
    choice: Choice | None

    def seen_by(self, other: Forward) -> Forward:
        """This forward pass, without layers where the other shows none."""
        return self if other.hiddens else Forward(self.logits, (), (), (), self.choice)


def split_batches(ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Blocks of ids [N, S] in batches whose logits fit in memory."""
    rows = LOGITS_BYTES // (4 * ids.shape[1] * vocab_size)
    return cast("tuple[torch.Tensor, ...]", ids.split(min(max(rows, 1), BATCH)))


@dataclass
class Reference:
    """Unpatched transformers with eager experts.

    One full forward without a cache, and what hooks on whole modules caught in it. A longrope that switches its factors
    within the text is the exception: it is fed in pieces, with a cache, as the package is. `rounding` is entered around
    each forward: where activations are rounded with scales that are part of the file, a twin rounds them too.
    """

    model: Any
    rounding: AbstractContextManager[Any] = field(default_factory=nullcontext)
    hiddens: dict[int, torch.Tensor] = field(default_factory=dict)
    attended: dict[int, torch.Tensor] = field(default_factory=dict)
    routers: dict[int, Any] = field(default_factory=dict)
    modules: dict[int, torch.nn.Module] = field(default_factory=dict)
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    gate: Gate | None = None
    _forced: Mapping[int, Any] | None = None

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, num_prefill: int | None = None) -> Forward:
        """Logits and inner values over ids and mask [B, S].

        The package reads `num_prefill` tokens at once, and the others one at a time.

        All of them, if it is None.
        """
        size = ids.shape[1]
        if not self.reads_in_pieces(size):
            return self._read(ids, mask, None)
        first = num_prefill or size
        cache, ends = DynamicCache(), [first, *range(first + 1, size + 1)]
        pieces = zip([0, *ends], ends, strict=False)
        return _join([self._read(ids[:, start:end], mask[:, :end], cache) for start, end in pieces])

    def reads_in_pieces(self, size: int) -> bool:
        """Whether rows of this length are fed in pieces.

        A longrope that switches within the row makes it so.
        """
        switch = rotary_switch(self.model.config)
        return switch is not None and size > switch

    def scores(self, layer: int) -> torch.Tensor:
        """The layer's selection scores [B * S, E] in the last pass."""
        return self.score_of(layer, first_of(self.routers[layer]))

    def score_of(self, layer: int, logits: torch.Tensor) -> torch.Tensor:
        """A layer's selection scores [B * S, E] for these router logits."""
        assert self.gate is not None, "a router in a model without a gate"
        return selection_scores(logits.reshape(-1, logits.shape[-1]), self.gate, self.biases.get(layer))

    @contextmanager
    def computing(self, mode: AbstractContextManager[Any]) -> Iterator[None]:
        """Context manager: forward passes compute in a graph's arithmetic."""
        before, self.rounding = self.rounding, mode
        try:
            yield
        finally:
            self.rounding = before

    @contextmanager
    def forced(self, routers: Mapping[int, Any]) -> Iterator[None]:
        """Context manager: routers return `routers` [layer], whatever their input."""
        self._forced = routers
        try:
            yield
        finally:
            self._forced = None

    @contextmanager
    def without_ffns(self) -> Iterator[None]:
        """Context manager: layers skip their FFN and their experts."""
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for n, layer in enumerate(find_layers(self.model)):
            block: Any = self.modules.get(n, getattr(layer, "mlp", None))
            replaced += [(layer, name, module) for name, module in layer.named_children() if module is block]
        for layer, name, _ in replaced:
            setattr(layer, name, nn.Identity())
        try:
            yield
        finally:
            for layer, name, module in replaced:
                setattr(layer, name, module)

    def place_at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """The argument that says where tokens stand, for a forward.

        A model without positions (ALiBi), or that counts them by the mask, takes none.
        """
        taken = "position_ids" in inspect.signature(self.model.forward).parameters
        return {"position_ids": positions} if taken else {}

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None) -> Forward:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.rounding:
            found = self.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **self.place_at(positions),
            )
        layers = range(len(self.hiddens))
        routers = tuple(self.scores(n).reshape(*ids.shape, -1) if n in self.routers else None for n in layers)
        choice = None if self.gate is None else self.gate.choice
        hiddens, attended = tuple(self.hiddens[n] for n in layers), tuple(self.attended.get(n) for n in layers)
        return Forward(found.logits, routers, hiddens, attended, choice)

    def _forget(self) -> None:
        """Release the model, whose hooks hold this object.

        Else all would stay in memory until the next collection of cycles.
        """
        self.model = None
        self.rounding = nullcontext()
        for caught in (self.modules, self.hiddens, self.attended, self.routers, self.biases):
            cast("dict[int, Any]", caught).clear()

    def _watch(self) -> None:
        config = self.model.config
        # a traced graph shows no more than router logits, and experts are told apart by them
        self.gate = find_gate(config) if find_refusal(config) is None else assume_gate(config)
        for n, layer in enumerate(find_layers(self.model)):
            layer.register_forward_hook(_catch(self.hiddens, n))
            if hasattr(layer, "self_attn"):
                cast(nn.Module, layer.self_attn).register_forward_hook(_catch(self.attended, n))
            for module in layer.modules():
                if hasattr(module, "experts"):
                    router = cast(torch.nn.Module, getattr(module, "gate", None) or module.router)
                    router.register_forward_hook(self._route(n))
                    self.modules[n] = module
                    if self.gate is not None and self.gate.selection_bias:
                        self.biases[n] = cast(torch.Tensor, router.e_score_correction_bias)

    def _route(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if self._forced is not None:
                output = self._forced[layer]
            elif layer in self.biases and self.model.dtype == torch.float64:
                # The gate computes in float32 in every model, which would hide the noise of its logits.
                output = (F.linear(inputs[0].reshape(-1, module.weight.shape[1]), module.weight), *output[1:])
            self.routers[layer] = output
            return output

        return hook


def _catch(caught: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    return lambda _module, _inputs, output: caught.update({layer: first_of(output)})


def first_of(output: Any) -> torch.Tensor:
    """A module's first output."""
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def open_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Iterator[Reference]:
    """Load a checkpoint as a reference; large experts stay on disk.

    Where the directory has scales by which a graph rounds its activations, so does the model. In float64 the norms, the
    rotary tables and the softmax of routers stay in float32: transformers computes them so in every model.

    Raises:
        ExportError: transformers cannot load it, or a weight is missing or left over.
    """
    try:
        model = load_whole(AutoModelForCausalLM, directory, dtype, experts_implementation="eager")
    except UpcycleError as error:
        raise ExportError(str(error)) from error
    has_scales = (directory / SCHEME_NAME).is_file() and bool(Twin(directory).scheme["input_scales"])
    if not has_scales:  # experts whose inputs have scales of their own are told by their addresses
        leave_experts_on_disk(model, directory)
    reference = Reference(model, RoundedInputs(model, Twin(directory)) if has_scales else nullcontext())
    reference._watch()
    try:
        with small_heap(model):
            yield reference
    finally:
        reference._forget()


def _join(parts: Sequence[Forward]) -> Forward:
    """Consecutive parts joined along the length."""

    def joined(layers: Sequence[Sequence[torch.Tensor | None]]) -> tuple[torch.Tensor | None, ...]:
        found = [[piece for piece in layer if piece is not None] for layer in zip(*layers, strict=True)]
        return tuple(torch.cat(pieces, 1) if pieces else None for pieces in found)

    hiddens = tuple(torch.cat(layer, 1) for layer in zip(*(part.hiddens for part in parts), strict=True))
    logits = torch.cat([part.logits for part in parts], 1)
    return Forward(
        logits,
        joined([part.routers for part in parts]),
        hiddens,
        joined([part.attended for part in parts]),
        parts[0].choice,
    )


def run_package(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor, num_prefill: int) -> Forward:
    """The package over ids [B, S].

    A prefill of `num_prefill` tokens, then one token at a time; then a prefill has the logits of its last alone.
    """
    return forward_of(look(decoder, FedText(ids, mask, num_prefill), decoder.taps), decoder)


def choice_of(decoder: Decoder) -> Choice | None:
    """How a package's tokens choose experts, by its own config.

    None for a model without experts.
    """
    gate = assume_gate(SimpleNamespace(**decoder.config))
    return None if gate is None else gate.choice


def read_scores(shown: torch.Tensor, name: str, decoder: Decoder) -> torch.Tensor:
    """Selection scores [..., E], of what the graph shows as `name`.

    That are scores with a bias, or router logits.
    """
    gate = assume_gate(SimpleNamespace(**decoder.config))
    return shown if gate is None or not names.is_router_logits(name) else selection_scores(shown, gate, None)


def forward_of(seen: Seen, decoder: Decoder) -> Forward:
    """A package's run as one forward pass, with its shown values."""
    layers = range(sum(map(names.is_hidden, seen.values)))
    hiddens = tuple(seen.values[names.hidden(n)] for n in layers)
    shown = [(names.selection_scores(names.experts(n)), names.router_logits(n)) for n in layers]
    routers = tuple(
        next((read_scores(seen.values[name], name, decoder) for name in pair if name in seen.values), None)
        for pair in shown
    )
    attended = tuple(seen.values.get(names.attention_output(n)) for n in layers)
    return Forward(seen.logits, routers, hiddens, attended, choice_of(decoder))
