"""The twin's products, computed as the graph computes them.

Inputs rounded as its operators round them, and what is not looked at left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dense2moe.export.parity.forward import Reference, first_of
from dense2moe.export.parity.inside.flips import Inside, Round, RoundedFfn, RoundedProduct, near_middle
from dense2moe.export.quantization.simulation import EightBits, RoundedInputs, StaticRounding
from dense2moe.upcycle.checkpoints.loaded import router_parameters, router_weights
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import layer_of

_MOVE = 1e-4  # of a number: a hundredth of the step of the largest in its group
_EMBEDDING = "model.embed_tokens.weight"
_PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})
_ONE_DTYPE = _PRODUCTS | {
    F.layer_norm,
    F.rms_norm,
    F.conv1d,
    F.scaled_dot_product_attention,
    torch.baddbmm,
    torch.Tensor.baddbmm,
    torch.bmm,
}
"""Functions whose tensors must all have one dtype."""


@dataclass(frozen=True)
class Narrowing:
    """Inputs and outputs cast to 16 bits, as in the graph."""

    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rounded numbers, in their original type."""
        return x.to(self.dtype).to(x.dtype)


@dataclass(frozen=True)
class Arithmetic:
    """How a graph computes what its twin computes.

    rounds: by the name of a tensor how its input is rounded. narrow: the 16 bits of its products, where they are.
    unknown: products and others, in words, whose rounding is none that is known, or not one that the twin has.
    """

    rounds: Mapping[str, Round]
    narrow: torch.dtype | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Call:
    """A rounded product that was computed: input, matrix and rounding."""

    x: torch.Tensor
    weight: torch.Tensor
    rounding: Round


class ProductMode(TorchFunctionMode):
    """A torch mode: the twin's products round as the graph's do.

    Weights are told by their addresses; experts are stacked, so theirs are told by the module that is computing. With
    `leaves_out` no product is computed but those of routers. `in_double`: inputs are float64, and so are products.
    """

    def __init__(
        self,
        reference: Reference,
        family: Architecture | None,
        arithmetic: Arithmetic,
        route: Callable[[int, torch.Tensor], torch.Tensor],
        unseen: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Hook the twin; `route` replaces a layer's router logits.

        `unseen` is entered around what is computed beside the text.
        """
        super().__init__()
        self._reference, self._family, self._route, self._unseen = reference, family, route, unseen
        self._width = int(reference.model.config.hidden_size)
        self._scope: tuple[str, int] | None = None
        self._only: torch.Tensor | None = None
        self._generator: torch.Generator | None = None
        self._calls: list[_Call] | None = None
        self.leaves_out = self.in_double = False
        model, rounds = reference.model, arithmetic.rounds
        self._rounds = {
            parameter.data_ptr(): rounds[name] for name, parameter in model.named_parameters() if name in rounds
        }
        if getattr(model.config, "tie_word_embeddings", False) and _EMBEDDING in rounds:
            self._rounds[model.get_output_embeddings().weight.data_ptr()] = rounds[_EMBEDDING]
        if isinstance(reference.rounding, RoundedInputs):  # scales that the twin has: of experts each its own
            self._rounds |= {
                address: rounding
                for address, rounding in reference.rounding.rounds.items()
                if isinstance(rounding, StaticRounding)
            }
        self._inside = {
            n: _find_inside(family, rounds, n, _count_experts(block.experts)) for n, block in reference.modules.items()
        }
        last = {id(weight) for weight in router_weights(model)}
        self._first = {  # matrices of routers whose products are no logits yet
            parameter.data_ptr() for parameter in router_parameters(model) if id(parameter) not in last
        }
        self._handles: list[Any] = []
        for n, block in reference.modules.items():
            parts = {"router": getattr(block, "gate", None) or block.router, "experts": block.experts}
            for name, part in parts.items():
                self._watch(cast(nn.Module, part), (name, n))

    def _watch(self, module: nn.Module, scope: tuple[str, int]) -> None:
        def enter(*_: Any) -> None:
            self._scope = scope

        def leave(*_: Any) -> None:
            self._scope = None

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def close(self) -> None:
        """Remove the hooks and release the twin's weights."""
        for handle in self._handles:
            handle.remove()
        self._rounds.clear()

    @contextmanager
    def moved(self, seed: int = 0) -> Iterator[None]:
        """Context manager: inputs of rounded products move by part of a step."""
        self._generator = torch.Generator().manual_seed(seed)
        try:
            yield
        finally:
            self._generator = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; `linear` as the graph's product."""
        if func is torch.addmm and args[2].ndim == 2:  # a Conv1D, whose matrix lies the other way round
            func, args = F.linear, (args[1], args[2].T, args[0])
        elif func in _PRODUCTS and args[1].data_ptr() in self._rounds:  # a FalconLinear
            func, args = F.linear, (args[0], args[1].T)
        if func is not F.linear:
            given: tuple[Any, Any] = (args, dict(kwargs or {}))
            args, kwargs = _widen(given) if self.in_double and func in _ONE_DTYPE else given
            return func(*args, **(kwargs or {}))
        x, weight, *rest = args
        in_router = self._scope is not None and self._scope[0] == "router"
        is_first = in_router and weight.data_ptr() in self._first
        rounding = None if in_router else self._find(weight)
        if self.in_double:
            weight, rest = weight.double(), [None if value is None else value.double() for value in rest]
            x = x.double()
        if is_first:
            return func(x, weight, *rest, **(kwargs or {}))
        if in_router:
            assert self._scope is not None
            own = func(x, weight, *rest, **(kwargs or {}))
            return self._only.to(own.dtype) if self._only is not None else self._route(self._scope[1], own)
        if self.leaves_out and self._only is None:
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        if rounding is None:
            return func(x, weight, *rest, **(kwargs or {}))
        if self._calls is not None:
            self._calls.append(_Call(x, weight, rounding))
        if self._generator is not None:
            x = x * (1 + _MOVE * torch.randn(x.shape, generator=self._generator))
        found = func(rounding(x.float()).to(x.dtype), weight, *rest, **(kwargs or {}))
        return rounding(found) if isinstance(rounding, Narrowing) else found

    def _find(self, weight: torch.Tensor) -> Round | None:
        """How the product by a matrix rounds its input."""
        rounding = self._rounds.get(weight.data_ptr())
        if rounding is not None or self._scope is None:
            return rounding
        layer = self._scope[1]
        # Where an expert is as wide as the residual stream, its first matrix has twice as many rows as its last.
        is_last = weight.shape[1] != self._width or weight.shape[0] == self._width
        rounds = [pair[is_last] for pair in self._inside[layer]]
        return rounds[self._find_expert(layer, weight) if len(rounds) > 1 else 0]

    def _find_expert(self, layer: int, weight: torch.Tensor) -> int:
        """An expert's number, by its matrix's place in the stack."""
        for stacked in cast(nn.Module, self._reference.modules[layer].experts).parameters():
            offset = weight.data_ptr() - stacked.data_ptr()
            if stacked.ndim == 3 and 0 <= offset < stacked.numel() * stacked.element_size():
                return offset // (stacked.stride(0) * stacked.element_size())
        return 0

    def inside_of(self, module: nn.Module, given: torch.Tensor, factor: float = 1.0) -> Inside | None:
        """A product's or dense FFN's 8-bit rounding; None without one.

        What it gives is multiplied by the factor.
        """
        flat = given.reshape(-1, given.shape[-1])
        if isinstance(module, nn.Linear):
            rounding = self._rounds.get(module.weight.data_ptr())
            return RoundedProduct(flat, module.weight, rounding, factor) if isinstance(rounding, EightBits) else None
        matrices = [each.weight for each in module.children() if isinstance(each, nn.Linear)]
        roundings = [self._rounds.get(each.data_ptr()) for each in matrices]
        if not any(isinstance(each, EightBits) for each in roundings):
            return None
        firsts = [each for each, weight in zip(roundings, matrices, strict=True) if weight.shape[1] == flat.shape[1]]
        return RoundedFfn(flat, lambda some, _: self._run_alone(module, some, None), _eight_bits(firsts), factor)

    def inside_experts(self, n: int, given: torch.Tensor) -> Inside | None:
        """Rounding inside a layer's experts for tokens [T, H].

        The tokens go where the graph sends them.
        """
        pairs = self._inside[n]
        if not _eight_bits([last for _, last in pairs]):
            return None
        gate = self._reference.gate
        logits = first_of(self._reference.routers[n])
        logits = logits.reshape(-1, logits.shape[-1])
        return RoundedFfn(
            given,
            lambda some, rows: self._run_alone(self._reference.modules[n], some, logits[rows]),
            _eight_bits([first for first, _ in pairs]),
            largest=max(1.0, 1.0 if gate is None else gate.scale),
        )

    def inside_shared(self, n: int, layer: nn.Module, given: torch.Tensor | None) -> Inside | None:
        """Rounding inside a shared expert beside a layer's block.

        Its result shows in the residual stream alone.
        """
        family = self._family
        if given is None or family is None or family.shared is None or not family.shared_is_outside:
            return None
        name = family.shared.up.format(layer=n).partition(f".{n}.")[2].removesuffix(".weight").rpartition(".")[0]
        factor = family.multipliers(self._reference.model.config).residual
        return self.inside_of(layer.get_submodule(name), given, factor)

    def _run_alone(
        self, module: nn.Module, given: torch.Tensor, logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Run an FFN or experts on rows [T, H] alone.

        Router logits [T, E] send the rows to experts.

        Its outputs, and by row what flips inside may add to them.
        """
        reference, scope = self._reference, self._scope
        before = dict(reference.routers)
        self._only, self._calls = logits, []
        try:
            with self._unseen():
                output = first_of(module(given[None])).reshape(given.shape)
        finally:
            calls, self._calls, self._only, self._scope = self._calls, None, None, scope
            reference.routers.update(before)
        found: list[list[torch.Tensor]] = [[] for _ in given]
        for first, last in pairwise(calls):
            x, inner = first.x.flatten(0, -2), last.x.flatten(0, -2)
            if x.shape[1] != given.shape[1] or last.weight.shape[0] != given.shape[1] or len(x) != len(inner):
                continue
            if last.x is first.x:  # gate and up of one FFN
                continue
            for row, columns in zip(x, near_middle(inner, last.weight, last.rounding, "inner"), strict=True):
                for place in (given == row).all(-1).nonzero()[:, 0].tolist() if columns else ():
                    found[place] += columns
        return output, found


def _widen(given: Any) -> Any:
    """All numbers inside as float64."""
    if isinstance(given, dict):
        return {name: _widen(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(map(_widen, given))
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def _eight_bits(roundings: Sequence[Round | None]) -> tuple[EightBits, ...]:
    """The roundings to 8 bits, each once."""
    return tuple(dict.fromkeys(each for each in roundings if isinstance(each, EightBits)))


def _count_experts(experts: Any) -> int:
    """How many are stacked in a module."""
    return next((len(stacked) for stacked in experts.parameters() if stacked.ndim == 3), 1)


def _find_inside(
    family: Architecture | None, rounds: Mapping[str, Round], n: int, num_experts: int
) -> list[tuple[Round | None, Round | None]]:
    """How each expert of a layer rounds the inputs of its matrices."""
    if family is not None and family.routed is not None:
        routed = family.routed
        pairs = [
            (
                rounds.get(routed.up.format(layer=n, expert=expert)),
                rounds.get(routed.down.format(layer=n, expert=expert)),
            )
            for expert in range(num_experts)
        ]
        return pairs if any(isinstance(each, StaticRounding) for pair in pairs for each in pair) else pairs[:1]
    names = [name for name in rounds if layer_of(name) == n and "expert" in name and "shared" not in name]
    lasts = [name for name in names if any(word in name for word in ("down", "w2", "output_linear"))]
    return [(rounds.get(next((name for name in names if name not in lasts), "")), rounds.get(next(iter(lasts), "")))]
