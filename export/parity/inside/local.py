"""Each place of a package on its own input, beside the twin's.

One forward of the twin goes beside what the graph showed. At every place that the graph shows, the twin's value is
compared with the graph's and then replaced by it. So each part of the twin reads what the same part of the graph has
read, an error is not carried on, and what is found wrong is wrong there. That holds for rounded activations too: an
operator that rounds its input rounds the same numbers as the twin, and so gives what the twin gives to float32's own
noise, where whole models that round by other sums part from layer to layer.

The noise is measured by the same layers in float64, on the same inputs. A number that lies between two integers may be
rounded to either; inside the experts of a fused operator such a number cannot even be seen. These flips are told apart
(`dense2moe.export.parity.inside.flips`), counted, and no errors.

The twin's routers say what the graph's said, so no near-tie sends a token to other experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache

from dense2moe.export.parity.forward import Reference, first_of
from dense2moe.export.parity.inside.blame import find_factors, find_wrong_experts
from dense2moe.export.parity.inside.meter import Meter, PlaceErrors
from dense2moe.export.parity.inside.products import Arithmetic, ProductMode
from dense2moe.export.parity.place import OUTSIDE, Place, PlacePart
from dense2moe.export.parity.taps import Seen, Taps
from dense2moe.export.parity.ties import EXACT_TIE
from dense2moe.export.quantization.simulation import EightBits
from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.gates.choice import choice_margin
from dense2moe.upcycle.gates.gate import Choice
from dense2moe.upcycle.models.architecture import Architecture

_NOISE_TOKENS = 16  # of the head, whose matrix is large
_NUM_MOVES = 4


@dataclass
class LocalCheck:
    """The twin, hooked at every place that a package shows."""

    reference: Reference
    taps: Taps
    family: Architecture | None
    arithmetic: Arithmetic
    _parts: frozenset[PlacePart] | None = None
    own_routers: dict[int, torch.Tensor] = field(default_factory=dict)
    _follows: bool = False
    blame: dict[int, tuple[tuple[int, ...], tuple[float, float] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hook the modules, and find their weights."""
        self._mode = ProductMode(self.reference, self.family, self.arithmetic, self._say, self._unseen)
        self.meter = Meter(self.taps, self.arithmetic, self._mode)
        self._handles: list[Any] = []
        model = self.reference.model
        layers = find_layers(model)
        for n, layer in enumerate(layers):
            self._hook_layer(n, layer)
        self._last = len(layers) - 1
        norm = getattr(model.get_decoder(), "norm", None)
        if norm is not None:
            self._handles.append(norm.register_forward_hook(self._at((OUTSIDE, "final norm"))))

    @property
    def mode(self) -> ProductMode:
        """The mode in which the twin computes with the graph's arithmetic."""
        return self._mode

    def moved(self) -> AbstractContextManager[None]:
        """Context manager: inputs of rounded products move by part of a step."""
        return self._mode.moved()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._mode.close()

    def measure(
        self, seen: Seen, parts: Sequence[PlacePart] | None = None, measures_noise: bool = False
    ) -> dict[Place, PlaceErrors]:
        """Compare the values seen at all places, or at some parts.

        The rest of the twin is then not computed.
        """
        self.meter.seen, self._parts, self.meter.found = seen, None if parts is None else frozenset(parts), {}
        self.meter.measures_noise, self._mode.leaves_out = measures_noise, parts is not None
        size = seen.ids.shape[1]
        pieces = [(0, size)]
        if self.reference.reads_in_pieces(size):
            ends = [seen.num_prefill, *range(seen.num_prefill + 1, size + 1)]
            pieces = list(zip([0, *ends], ends, strict=False))
        with self._ending(), torch.inference_mode(), self._mode, self._shortened():
            self.meter.moves = False if self._is_coarse and self._parts is None else None
            cache = self._run(seen, pieces)
            # the longer a row, the more its rounding weighs
            if self._parts is not None and self.arithmetic.narrow is not None:
                self.meter.shakes = True
                self._run(seen, pieces)
            # rows padded at their left may be rotated from where they begin or from their slots: what attends is alike
            if bool(seen.mask.all()):
                self.meter.compare_cache(cache)
            if self.meter.moves is not None:
                self._move(seen, pieces)
        return self.meter.found

    @property
    def _is_coarse(self) -> bool:
        """Whether inputs are rounded inside of layers that show no products.

        As in a traced graph; what flips there cannot be told apart.
        """
        rounds = any(isinstance(rounding, EightBits) for rounding in self.arithmetic.rounds.values())
        return rounds and not any(part == "query, key and value" for _, part in self.taps.names)

    def _move(self, seen: Seen, pieces: Sequence[tuple[int, int]]) -> None:
        """Measure what flips of a rounding move the twin's values by."""
        self.meter.moves, self.meter.measures_noise = True, False
        for seed in range(_NUM_MOVES):
            with self._mode.moved(seed):
                cache = self._run(seen, pieces)
            if bool(seen.mask.all()):
                self.meter.compare_cache(cache)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Context manager: whatever happens in it, comparing ends with it."""
        try:
            yield
        finally:
            self.meter.forget()
            self._parts, self._mode.leaves_out = None, False

    def _run(self, seen: Seen, pieces: Sequence[tuple[int, int]]) -> DynamicCache:
        """One forward pass beside the seen values; returns its cache."""
        cache = DynamicCache()
        for start, stop in pieces:
            self.meter.span = slice(start, stop)
            positions = (seen.mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            output = self.reference.model(
                input_ids=seen.ids[:, start:stop],
                attention_mask=seen.mask[:, :stop],
                past_key_values=cache,
                use_cache=True,
                **self.reference.place_at(positions),
                **({"logits_to_keep": 1} if self._parts is not None else {}),
            )
            if self._parts is None:
                self._compare_head(output.logits, seen.logits)
        return cache

    def _shortened(self) -> AbstractContextManager[None]:
        """Context manager: layers skip FFNs where only attention is compared."""
        some = self._parts is not None and self.family is not None
        return self.reference.without_ffns() if some else nullcontext()

    def _compare_head(self, own: torch.Tensor, shown: torch.Tensor) -> None:
        """The logits of the last tokens, from the graph's final norm."""
        tokens = min(own.shape[1], shown.shape[1])
        assert self.meter.seen is not None
        stop = self.meter.span.indices(self.meter.seen.ids.shape[1])[1]
        self.meter.span = slice(stop - tokens, stop)
        head, final = self.reference.model.get_output_embeddings(), self._tap((OUTSIDE, "final norm"))
        place: Place = (OUTSIDE, "head")
        if self.meter.measures_noise and final is not None and isinstance(head, nn.Linear):
            some = final[:, :_NOISE_TOKENS].reshape(-1, final.shape[-1])
            exact = torch.mm(some.double(), head.weight.double().T)  # which the mode never rounds
            self.meter.noise[place] = max(
                self.meter.noise.get(place, 0.0),
                float(((torch.mm(some, head.weight.T) - exact).norm(dim=-1) / exact.norm(dim=-1)).max()),
            )
        scale = float(getattr(self.reference.model.config, "logits_scaling", 1.0))
        inside = self._mode.inside_of(head, final, 1 / scale) if final is not None else None
        self.meter.measures_noise, before = False, self.meter.measures_noise
        self.meter.compare(place, own[:, -tokens:], shown[:, -tokens:], inside)
        self.meter.measures_noise = before

    # Hooks

    def _hook_layer(self, n: int, layer: nn.Module) -> None:
        handles, taps = self._handles, self.taps.names
        before: Place = (n - 1, "residual stream") if n else (OUTSIDE, "embedding")
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, given, named: self._enter_layer(before, given, named), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(partial(self._leave_layer, n), with_kwargs=True))
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            projections = [getattr(attention, f"{letter}_proj", None) for letter in "qkv"]
            if (n, "query, key and value") in taps and all(isinstance(each, nn.Linear) for each in projections):
                start = 0
                for each in cast("list[nn.Linear]", projections):
                    rows = slice(start, start + each.out_features)
                    handles.append(each.register_forward_hook(self._at((n, "query, key and value"), rows)))
                    start = rows.stop
            output = getattr(attention, "o_proj", None)
            if output is not None:
                handles.append(output.register_forward_pre_hook(lambda _, given: self._read_attention(n, given)))
                handles.append(output.register_forward_hook(self._at((n, "attention output"))))
        norms = {
            "attention norm": self.family and self.family.find("attention_norm"),
            "FFN norm": self.family and self.family.find("ffn_norm"),
        }
        for part, pattern in norms.items():
            if pattern and (n, part) in taps:
                module = layer.get_submodule(pattern.format(layer=n).removesuffix(".weight").partition(f".{n}.")[2])
                handles.append(module.register_forward_hook(self._at((n, cast(PlacePart, part)))))
        block = self.reference.modules.get(n)
        if self.family is not None and self.family.find("ffn_norm") is None and (n, "FFN norm") in taps:
            ffn = cast(nn.Module, block if block is not None else layer.mlp)
            handles.append(ffn.register_forward_pre_hook(lambda _, given: self._enter_ffn(n, given)))
        if block is not None:
            handles.append(block.register_forward_hook(lambda _, given, output: self._leave_block(n, given, output)))
        elif (n, "FFN") in taps and hasattr(layer, "mlp"):
            handles.append(cast(nn.Module, layer.mlp).register_forward_hook(self._at((n, "FFN"))))

    def _tap(self, place: Place) -> torch.Tensor | None:
        """The graph's value at a place now; None if not compared."""
        names = self.taps.names.get(place, ())
        if self.meter.seen is None or (self._parts is not None and place[1] not in self._parts):
            return None
        pieces = [self.meter.seen.values[name][:, self.meter.span] for name in names if name in self.meter.seen.values]
        if not pieces or len(pieces) < len(names):
            return None
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        if self.meter.shakes and place[1] == "query, key and value" and self.arithmetic.narrow is not None:
            step = torch.finfo(self.arithmetic.narrow).eps
            found = found * (
                1 + step * (torch.rand(found.shape, generator=torch.Generator().manual_seed(place[0])) - 0.5)
            )
        return found.double() if self._mode.in_double else found

    def _enter_layer(
        self, place: Place, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        tap = self._tap(place)
        if tap is None or self._mode.in_double:
            return None
        if place == (OUTSIDE, "embedding"):
            self.meter.compare(place, given[0] if given else named["hidden_states"], tap)
        return ((tap, *given[1:]), named) if given else (given, {**named, "hidden_states": tap})

    def _leave_layer(
        self, n: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        """Compare a layer's output; the head reads the graph's last one."""
        if self.meter.seen is None or self._mode.in_double:
            return None
        tap = self._tap((n, "residual stream"))
        if tap is not None:
            inside = self._mode.inside_shared(n, module, self._tap((n, "FFN norm")))
            own, decided = first_of(output), None
            if n in self.reference.routers and (n, "experts") not in self.taps.names:
                view = self.meter.view(own)
                decided = self._is_decided(n, view.shape[0] * view.shape[1]).reshape(view.shape[:-1])
            self.meter.compare((n, "residual stream"), own, tap, inside, decided)
        if self.meter.measures_noise:
            self._run_in_double(module, given, named)
        if tap is None or n < self._last:
            return None
        return (tap, *output[1:]) if isinstance(output, tuple) else tap

    def _at(self, place: Place, part: slice | None = None) -> Callable[..., Any]:
        """A hook that compares a module's output, then replaces it."""

        def hook(module: Any, given: Any, output: Any) -> Any:
            tap = self._tap(place)
            if tap is None:
                return None
            own = first_of(output)
            some = (tap if part is None else tap[..., part]).reshape(own.shape)
            if self._parts is None:
                self.meter.compare(place, own, some, self._mode.inside_of(module, given[0]))
            return (some, *output[1:]) if isinstance(output, tuple) else some

        return hook

    def _enter_ffn(self, n: int, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Compare and replace an FFN's input where no norm precedes it."""
        tap = self._tap((n, "FFN norm"))
        if tap is None:
            return None
        self.meter.compare((n, "FFN norm"), given[0], tap.reshape(given[0].shape))
        return (tap.reshape(given[0].shape), *given[1:])

    def _read_attention(self, n: int, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tap = self._tap((n, "attention"))
        if tap is None:
            return None
        if self.meter.shakes and not self._mode.in_double:
            self.meter.add_shaken(n, given[0])
            return (tap.reshape(given[0].shape), *given[1:])
        if self.arithmetic.narrow is not None and not self._mode.in_double:
            self.meter.attended[n] = (
                torch.cat([self.meter.attended[n], given[0]], 1) if n in self.meter.attended else given[0]
            )
        self.meter.compare((n, "attention"), given[0], tap)
        return (tap.reshape(given[0].shape), *given[1:])

    def _leave_block(self, n: int, given: tuple[Any, ...], output: Any) -> Any:
        tap = self._tap((n, "experts"))
        if tap is None:
            return None
        own = first_of(output)
        some = tap.reshape(own.shape)
        x = given[0].reshape(-1, given[0].shape[-1])
        decided = self._is_decided(n, len(x)).reshape(self.meter.view(own).shape[:-1])
        self.meter.compare((n, "experts"), own, some, self._mode.inside_experts(n, x), decided)
        if not self._mode.in_double:
            self._find_blame(n, own, some, decided)
        return (some, *output[1:]) if isinstance(output, tuple) else some

    def _find_blame(self, n: int, own: torch.Tensor, shown: torch.Tensor, decided: torch.Tensor) -> None:
        """Find always-wrong experts, and factors of the twin's outputs."""
        place: Place = (n, "experts")
        wrong = ~(self.meter.found[place].errors[:, self.meter.span] <= self.meter.limit(place))
        assert self.meter.seen is not None
        judged = (decided & self.meter.seen.mask.bool()[:, self.meter.span]).flatten()
        wrong = wrong.flatten()[judged]
        if not wrong.any():
            return
        ours, theirs = (self.meter.view(value).flatten(0, 1)[judged] for value in (shown, own))
        blamed = find_wrong_experts(self.reference.scores(n)[judged], self._choice, wrong)
        self.blame[n] = blamed, find_factors(ours, theirs)

    @property
    def _choice(self) -> Choice:
        """How tokens choose experts, if there are any."""
        assert self.reference.gate is not None, "asked for the choice of a model without experts"
        return self.reference.gate.choice

    def _is_decided(self, n: int, count: int) -> torch.Tensor:
        """Tokens whose experts are chosen by more than a rounding error."""
        return choice_margin(self.reference.scores(n), self._choice).reshape(count) >= EXACT_TIE

    @contextmanager
    def following(self, seen: Seen) -> Iterator[None]:
        """Context manager: the twin's routers repeat the graph's on this text.

        Nothing else is replaced or compared.
        `own_routers` has what they would have said.
        """
        self.meter.seen = Seen(
            seen.ids,
            seen.mask,
            seen.num_prefill,
            seen.logits,
            {name: seen.values[name] for name in self._router_names(seen)},
        )
        self._follows, self.meter.span, self.own_routers = True, slice(None), {}
        try:
            yield
        finally:
            self.meter.seen, self._follows = None, False

    def _router_names(self, seen: Seen) -> list[str]:
        return [
            name
            for (_, part), names in self.taps.names.items()
            if part == "router"
            for name in names
            if name in seen.values
        ]

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Context manager: nothing is compared and nothing replaced."""
        seen, self.meter.seen = self.meter.seen, None
        try:
            yield
        finally:
            self.meter.seen = seen

    def _say(self, n: int, own: torch.Tensor) -> torch.Tensor:
        """The graph's router logits, nudge included, replacing `own` [T, E]."""
        tap = self._tap((n, "router"))
        if tap is None:
            return own
        assert self.meter.seen is not None
        batch = len(self.meter.seen.ids)
        shown = tap.reshape(batch, -1, own.shape[-1])
        if self._follows:
            self.own_routers[n] = own
        else:
            self.meter.compare((n, "router"), own.view(shown.shape), shown)
        if self.meter.seen.nudge is not None:
            shown = shown + self.meter.seen.nudge.view(batch, -1, own.shape[-1])[:, self.meter.span]
        return shown.reshape(own.shape).to(own.dtype)

    def _run_in_double(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Run the layer in float64 too, to measure its places' noise."""

        def widen(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.double()
            if isinstance(value, Cache):
                return None
            return tuple(map(widen, value)) if isinstance(value, tuple) else value

        routers = dict(self.reference.routers)
        expected = dict(self.meter.expected)
        arguments = (
            tuple(map(widen, given)),
            {name: widen(value) for name, value in named.items()},
        )
        self._mode.in_double = True
        try:
            module(*arguments[0], **arguments[1])
            if self.arithmetic.narrow is not None:  # heads are rotated in 16 bits, and rounded once more
                self.meter.expected, self.meter.shakes = expected, True
                module(*arguments[0], **arguments[1])
        finally:
            self._mode.in_double = self.meter.shakes = False
            self.reference.routers.update(routers)
        self.meter.expected = {}
