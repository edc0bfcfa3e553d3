"""Errors of places inside a graph, and the noise of float32 there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dense2moe.export.parity.inside.flips import Inside
from dense2moe.export.parity.inside.products import Arithmetic, ProductMode
from dense2moe.export.parity.place import Place
from dense2moe.export.parity.taps import Seen, Taps

LEAST_NOISE = 2.0**-22
"""Two units in the last place of float32: a norm's factor is rounded by as much, alike for all elements of a token."""
_PROVISIONAL = 32  # of the least noise, where the noise is not known yet
_MOST_EXPLAINED = 256
_FLIPPED = 30.0
"""Times the median error of tokens: beyond it a token of the noise's own text is one with a flip."""
TINY = 1e-30
_NARROW_PARTS = ("query, key and value", "cache", "attention", "attention output", "experts", "FFN", "head")
"""Of a graph in 16 bits what is computed in them, whatever it is widened to then.

Our residual stream, norms and routers are float32.
"""
_SHAKEN = 2.0  # queries, keys and values rounded once more give the worst token; that of the limit is a mean one
_NARROW_SHARE = 0.2  # of the type's epsilon: rounding to the nearest errs by a fifth of it in the mean of squares


@dataclass
class PlaceErrors:
    """One place on one text.

    Relative errors [B, S] of each token, which of them are judged, and tokens whose error is a flip of rounding.
    `parts` are the sums over tokens of found times expected, and of expected squared: their ratio is the factor between
    both.
    """

    errors: torch.Tensor
    judged: torch.Tensor
    flips: int = 0
    parts: tuple[float, float] = (0.0, 0.0)

    @property
    def worst(self) -> float:
        """The largest judged error; NaN where any is NaN."""
        some = self.errors[self.judged]
        return float(some.max()) if len(some) else 0.0

    def first(self, limit: float) -> int | None:
        """First place in a row beyond the limit; pads do not count."""
        beyond = self.judged & ~(self.errors <= limit)
        places = (self.judged.cumsum(1) - 1)[beyond]
        return int(places.min()) if len(places) else None


class Meter:
    """Errors of a graph's places against the twin's, text by text.

    `noise`, `narrow_noise` and `moved_noise` grow with each text that they are measured on; `found` is of the last one.
    `span` are the columns of the text that are fed. While `shakes`, queries, keys and values are rounded once more.
    While `moves`, the twin's inputs move by part of a rounding step, and what its values move by is `moved_noise`.
    """

    def __init__(self, taps: Taps, arithmetic: Arithmetic, mode: ProductMode) -> None:
        self._taps, self._arithmetic, self._mode = taps, arithmetic, mode
        self.limit: Callable[[Place], float] = lambda _: math.inf
        self.narrow_taps: frozenset[str] = frozenset()
        self.noise: dict[Place, float] = {}
        self.narrow_noise: dict[Place, float] = {}
        self.moved_noise: dict[Place, float] = {}
        self.moves: bool | None = None
        self._steady: dict[tuple[Place, int], torch.Tensor] = {}
        self.found: dict[Place, PlaceErrors] = {}
        self.seen: Seen | None = None
        self.span = slice(None)
        self.measures_noise = self.shakes = False
        self.expected: dict[Place, torch.Tensor] = {}
        self.attended: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Forget the current text, whatever happened in it."""
        self.seen, self.measures_noise, self.shakes = None, False, False
        self.expected, self.attended, self._steady, self.moves = {}, {}, {}, None

    def is_narrow(self, place: Place) -> bool:
        """Whether a place is computed in 16 bits."""
        return place[1] in _NARROW_PARTS or any(name in self.narrow_taps for name in self._taps.names.get(place, ()))

    def compare(
        self,
        place: Place,
        expected: torch.Tensor,
        found: torch.Tensor,
        inside: Inside | None = None,
        decided: torch.Tensor | None = None,
    ) -> None:
        """Keep a place's errors.

        `inside` knows what flips of a rounding may have added to tokens.
        """
        if self._mode.in_double:
            self._add_noise(place, expected)
            return
        if self.moves is not None:
            self._keep_steady(place, expected)
        if self.moves:
            return
        if self.measures_noise:
            before = self.expected.get(place)
            self.expected[place] = (
                expected if before is None or place[1] != "query, key and value" else torch.cat([before, expected], -1)
            )
        errors = self.errors(found, expected)
        flips = self._tell_flips_apart(place, errors, found, expected, inside)
        self.keep(place, errors, found, expected, decided, flips)

    def keep(
        self,
        place: Place,
        errors: torch.Tensor,
        found: torch.Tensor,
        expected: torch.Tensor,
        decided: torch.Tensor | None = None,
        flips: int = 0,
    ) -> None:
        """Keep a place's errors [B, S], judging decided real tokens.

        Padding, and tokens that are not `decided`, are not judged.
        """
        assert self.seen is not None
        real = self.seen.mask.bool()[:, self.span][:, -errors.shape[1] :]
        judged = real if decided is None else real & decided
        a, b = self.view(found)[judged].double(), self.view(expected)[judged].double()
        parts = float((a * b).sum()), float((b * b).sum())
        before = self.found.get(place)
        if before is None:
            whole = torch.zeros(self.seen.mask.shape)
            before = PlaceErrors(whole, torch.zeros_like(whole, dtype=torch.bool))
            self.found[place] = before
        columns = slice(*self.span.indices(whole_length := before.errors.shape[1]))
        start = (columns.stop if columns.stop is not None else whole_length) - errors.shape[1]
        place_of = slice(start, start + errors.shape[1])
        kept = before.errors[:, place_of]
        before.errors[:, place_of] = torch.where(
            errors.float().isnan() | kept.isnan(), torch.nan, torch.maximum(kept, errors.float())
        )
        before.judged[:, place_of] |= judged
        before.flips += flips
        before.parts = before.parts[0] + parts[0], before.parts[1] + parts[1]
        kind = self._arithmetic.narrow
        if kind is not None and (self.is_narrow(place) or place[1] not in ("embedding", "router")):
            rounded = self.errors(expected.to(kind).to(expected.dtype), expected)[judged]
            least = _NARROW_SHARE * torch.finfo(kind).eps  # what is rounded already loses nothing more
            self.narrow_noise[place] = max(
                self.narrow_noise.get(place, least), float(rounded.mean()) if len(rounded) else 0.0
            )

    def compare_cache(self, cache: DynamicCache) -> None:
        """Keep the errors of cached keys and values, by head.

        `cache` is the twin's KV cache.
        """
        assert self.seen is not None
        for n, (key, value) in self.seen.cache.items():
            layer: Any = cache.layers[n]
            if getattr(layer, "keys", None) is None:
                continue
            keys, values = layer.keys, layer.values
            length = min(keys.shape[2], key.shape[2])  # of a window the last ones alone may be kept
            self.span = slice(key.shape[2] - length, None)
            own, shown = (
                torch.cat([a[:, :, -length:], b[:, :, -length:]], 1).transpose(1, 2)
                for a, b in ((keys, values), (key, value))
            )
            own = F.pad(own, (0, shown.shape[-1] - own.shape[-1]))  # what a graph pads its heads with are zeros
            if self.moves is not None:
                self._keep_steady((n, "cache"), own.flatten(2))
            if self.moves:
                continue
            by_head = (shown - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=TINY)
            self.keep((n, "cache"), by_head.amax(-1), shown.flatten(2), own.flatten(2))

    def view(self, value: torch.Tensor) -> torch.Tensor:
        """A value as [B, S, width]: by row of text and token."""
        assert self.seen is not None
        return value.reshape(len(self.seen.ids), -1, value.shape[-1])

    def errors(self, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Relative errors [B, S] of tokens."""
        found, expected = self.view(found), self.view(expected)
        errors: torch.Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=TINY)
        return errors

    def add_shaken(self, n: int, shaken: torch.Tensor) -> None:
        """Add attention's noise in 16 bits: inputs rounded once more.

        On this text; `shaken` is its output with queries, keys and values rounded again.
        """
        assert self.seen is not None
        place: Place = (n, "attention")
        some = self.errors(shaken, self.attended[n][:, self.span])[self.seen.mask.bool()[:, self.span]]
        if len(some):
            self.narrow_noise[place] = max(self.narrow_noise.get(place, 0.0), float(some.max()) / _SHAKEN)

    def _keep_steady(self, place: Place, value: torch.Tensor) -> None:
        """Keep a twin's value, or what moved inputs change."""
        key = place, self.span.start or 0
        if not self.moves:
            self._steady[key] = value
            return
        assert self.seen is not None
        errors = self.errors(value, self._steady[key])
        some = errors[self.seen.mask.bool()[:, self.span][:, -errors.shape[1] :]]
        if len(some):
            self.moved_noise[place] = max(self.moved_noise.get(place, 0.0), float(some.max()))

    def _add_noise(self, place: Place, exact: torch.Tensor) -> None:
        narrow = self.expected.get(place)
        if narrow is None:
            return
        if place[1] == "query, key and value":  # one after the other
            self.expected[place], narrow = narrow[..., exact.shape[-1] :], narrow[..., : exact.shape[-1]]
        errors = self.errors(narrow.double().reshape(exact.shape), exact)
        assert self.seen is not None
        if self.shakes:
            if place[1] == "attention":
                some = errors[self.seen.mask.bool()[:, self.span]]
                self.narrow_noise[place] = max(self.narrow_noise.get(place, 0.0), float(some.max()) / _SHAKEN)
            return
        some = errors[self.seen.mask.bool()[:, self.span]]
        some = some[some <= max(_FLIPPED * float(some.median()), LEAST_NOISE)] if len(some) else some
        if len(some):
            self.noise[place] = max(self.noise.get(place, 0.0), float(some.max()))

    def _tell_flips_apart(
        self, place: Place, errors: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, inside: Inside | None
    ) -> int:
        """Subtract rounding flips from errors beyond the limit; returns their number."""
        assert self.seen is not None
        if inside is None:
            return 0
        limit = self.limit(place) if place in self.noise else min(self.limit(place), _PROVISIONAL * LEAST_NOISE)
        real = self.seen.mask.bool()[:, self.span][:, -errors.shape[1] :]
        rows = (real & ~(errors <= limit)).flatten().nonzero()[:_MOST_EXPLAINED, 0]
        ours = self.view(found).flatten(0, 1)
        count = 0
        for row, error in inside.explain(
            rows, ours[rows].double(), self.view(expected).flatten(0, 1)[rows].double(), limit
        ):
            errors[divmod(row, errors.shape[1])] = error
            count += 1
        return count
