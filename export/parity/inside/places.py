"""The check of all places, on text and with every expert.

Places are checked in every way of feeding the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.inside.local import LocalCheck
from dense2moe.export.parity.inside.meter import LEAST_NOISE, PlaceErrors
from dense2moe.export.parity.place import ATTENTION_PARTS, OUTSIDE, OWN_INPUT, PARTS, Place, name_place
from dense2moe.export.parity.records import PlaceCheck
from dense2moe.export.parity.taps import FedText, Seen, look
from dense2moe.export.parity.ways.cases import every_expert
from dense2moe.export.runtime.decoder import CPU, Decoder

_EXPERT_TOKENS = 64
_FEW_TOKENS = 4  # as many as an operator may compute by another kernel, and a graph by another branch
_TEXT_TOKENS = (
    128  # every product and norm is in every token; where attention looks in long rows is asked of the ways of feeding
)
_NARROW_MULTIPLE = 8.0
"""Of what rounding a result to 16 bits alone costs: operators that compute in 16 bits round a few times on the way."""
_FACTOR_SHARE = 1 / 6
"""Of a head's limit in 16 bits: what its logits may be larger or smaller by, all of them alike."""
_BEHIND_MULTIPLE = 4.0
"""Of it in a place in 32 bits behind one in 16.

A runtime that computes that one in 32 bits need not round what it gives on.
"""
_MOVED_MULTIPLE = 3.0
"""Of what the twin's values move by where inputs move by part of a rounding step."""
_NARROW_TYPES = ("tensor(float16)", "tensor(bfloat16)")


class PlacesCheck:
    """Checks a package's places, text by text; `result` has the worst."""

    def __init__(
        self,
        local: LocalCheck,
        decoder: Decoder,
        config: ParityConfig,
        provider: str,
        exact_twin: bool,
    ) -> None:
        """Prepare the check, if the twin's arithmetic is exactly known.

        Without an exact twin, or where this processor's rounding is not known, nothing inside is checked.
        """
        self._local = local
        self._local.meter.limit = self._limit
        self._local.meter.narrow_taps = frozenset(
            value.name for value in decoder.session.get_outputs() if value.type in _NARROW_TYPES
        )
        self._decoder, self._taps, self._config, self._provider = decoder, local.taps, config, provider
        self._judges = exact_twin and not local.arithmetic.unknown
        self._exact_twin = exact_twin
        self._worst: dict[Place, PlaceCheck] = {}

    @property
    def way_names(self) -> tuple[str, ...]:
        """Names of values shown in every way of feeding."""
        return self._taps.of_layers(ATTENTION_PARTS) if self._judges else ()

    def computing(self) -> AbstractContextManager[object]:
        """Context manager: the twin computes in the graph's arithmetic."""
        return self._local.reference.computing(self._local.mode) if self._exact_twin else nullcontext()

    def moved(self) -> AbstractContextManager[None]:
        """Context manager: inputs of rounded products move by part of a step."""
        return self._local.moved()

    def following(self, seen: Seen) -> AbstractContextManager[None]:
        """Context manager: the twin's routers repeat the graph's on this text."""
        return self._local.following(seen) if self._exact_twin else nullcontext()

    @property
    def own_routers(self) -> dict[int, torch.Tensor]:
        """The twin's own router logits by layer.

        They differ from the graph's logits, which the twin's routers followed.
        """
        return self._local.own_routers

    def close(self) -> None:
        """Release the twin."""
        self._local.close()

    def check_text(self, blocks: torch.Tensor, tell: Callable[[int], None]) -> None:
        """Check a text row in full, with every expert, and shortened.

        As it is, once so that every expert is visited, and its first tokens alone.
        """
        if not self._judges:
            return
        names = self._taps.all
        row = blocks[:1, : min(_EXPERT_TOKENS, blocks.shape[1])]
        nudge = None
        if self._taps.routers:
            gate = self._local.reference.gate
            assert gate is not None, "routers in a model without a gate"
            nudge = every_expert(row.shape[1], self._taps.num_experts, gate.max_experts_per_token)
        seen = look(self._decoder, FedText.whole(row), names, nudge, with_cache=True)
        self._add(self._local.measure(seen, measures_noise=self._config.noise_blocks > 0))
        tell(1)
        few = row[:, :_FEW_TOKENS]
        some = None if nudge is None else nudge[:_FEW_TOKENS]
        self._add(self._local.measure(look(self._decoder, FedText.whole(few), names, some, with_cache=True)))
        whole = blocks[:1, : min(_TEXT_TOKENS, blocks.shape[1], self._decoder.context_length)]
        self._add(self._local.measure(look(self._decoder, FedText.whole(whole), names, with_cache=True)))
        tell(2)

    def look_inside(self, seen: Seen) -> tuple[str, int | None] | None:
        """The first wrong place and token, in one way of feeding."""
        if not self._judges or not self.way_names:
            return None
        found = self._local.measure(seen, ATTENTION_PARTS)
        for place in sorted(found, key=_order):
            measured, limit = found[place], self._limit(place)
            if not measured.worst <= limit:
                return (
                    f"{name_place(*place)}{OWN_INPUT}: relative error {measured.worst:.1e} > {limit:.1e}",
                    measured.first(limit),
                )
        return None

    def result(self) -> tuple[PlaceCheck, ...] | str:
        """Every place's worst error, in the order of computation."""
        if not self._exact_twin:
            return "not judged: no checkpoint with the package's own weights was given"
        if not self._worst:
            return "not run: the package shows nothing of its layers"
        return tuple(self._worst[place] for place in sorted(self._worst, key=_order))

    def _limit(self, place: Place) -> float:
        # on CUDA it alone holds: products in float32 may round their factors to TF32
        limit = self._config.max_relative_error
        if self._provider == CPU and self._config.noise_blocks:
            limit = min(limit, self._config.noise_multiple * max(self._local.meter.noise.get(place, 0.0), LEAST_NOISE))
        multiple = _NARROW_MULTIPLE if self._local.meter.is_narrow(place) else _BEHIND_MULTIPLE
        moved = _MOVED_MULTIPLE * self._local.meter.moved_noise.get(place, 0.0)
        return max(limit, multiple * self._local.meter.narrow_noise.get(place, 0.0), moved)

    def _add(self, found: dict[Place, PlaceErrors]) -> None:
        for place, measured in found.items():
            limit = self._limit(place)
            experts, factors = self._local.blame.get(place[0], ((), None)) if place[1] == "experts" else ((), None)
            if (first := self._worst.get(place)) is not None and first.experts and not first.is_right:
                experts, factors = first.experts, first.factors  # each was heard beside every other there
            product, square = measured.parts
            check = PlaceCheck(
                *place,
                measured.worst,
                limit,
                self._local.meter.noise.get(place),
                int(measured.judged.sum()),
                measured.flips,
                product / square if square > 0 else 1.0,
                measured.first(limit),
                experts,
                factors,
                limit * _FACTOR_SHARE if self._local.arithmetic.narrow is not None and place[1] == "head" else None,
            )
            before = self._worst.get(place)
            flips = check.num_flips + (before.num_flips if before else 0)
            tokens = check.num_tokens + (before.num_tokens if before else 0)
            worse = check if before is None or _badness(check) > _badness(before) else before
            self._worst[place] = PlaceCheck(**{**worse.__dict__, "num_flips": flips, "num_tokens": tokens})


def _badness(check: PlaceCheck) -> float:
    ratio = max(check.error / check.limit, abs(check.factor - 1) / check.factor_limit if check.factor_limit else 0.0)
    return ratio if math.isfinite(ratio) else math.inf


def _order(place: Place) -> tuple[int, int]:
    """Places in the order of computation."""
    layer, part = place
    return (layer if layer != OUTSIDE or part == "embedding" else 1 << 30), PARTS.index(part)
