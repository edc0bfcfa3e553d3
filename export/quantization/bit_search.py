"""Bits of every part of a decoder, chosen by measured cost.

Cost is measured on text. A unit is a class of tensors in one layer, or the embedding, or the head. Each is quantized
alone, in every number of bits it may have, and the KL divergence from the model as it is is measured. Costs of units
are taken to add up, as they do while they are small (HAWQ-V2, Dong et al., 2020, section 3.2, with the second
derivatives measured as they act): then the choices that no other beats in both bytes and cost are had by starting with
the fewest bits everywhere, and raising one unit after the other, the one whose bytes buy most first (Everett, 1963,
Lagrange multipliers for allocation). What is reported is not that sum: perplexity is measured with all weights of a
choice together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.blockwise import is_quantized
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import BitSearch, SearchPoint, Sensitivity, Unit
from dense2moe.export.quantization.journal import RecordJournal
from dense2moe.export.quantization.sensitivity import Cost, Ruler, Weights
from dense2moe.upcycle.checkpoints.layerwise import embed
from dense2moe.upcycle.models.parts import TensorClass, layer_of
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.language import language_figures

SEARCHED: tuple[TensorClass, ...] = ("experts", "attention", "embedding", "head")
_MOST_NATS = 700.0  # exp of more is no float64
_NUM_PICTURED = 6
"""Points along the front that are measured to be drawn, besides those that the choice needs."""

Plan = Mapping[str, int]
CountBytes = Callable[[Plan], int]
ReadCandidate = Callable[[str, int], torch.Tensor]
"""A tensor as it comes to be in so many bits, by its name."""


class WeightsOf(Weights):
    """Candidate tensors, made when read; floats stay in the checkpoint."""

    def __init__(self, names: Collection[str], plan: Plan, read: ReadCandidate) -> None:
        self._bits = {name: plan[name] for name in names if is_quantized(plan[name])}
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, float32."""
        return self._read(name, self._bits[name])

    def __contains__(self, name: object) -> bool:
        """Whether it is one of them; none is made to tell."""
        return name in self._bits

    def __iter__(self) -> Iterator[str]:
        """Names of tensors."""
        return iter(self._bits)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._bits)


class BitChoices:
    """Bit plans on the Pareto front of bytes and cost.

    Plans are sorted by bytes, the smallest first.
    """

    def __init__(
        self, base: Plan, units: Mapping[Unit, Collection[str]], sensitivities: Collection[Sensitivity]
    ) -> None:
        """Build the front; `base` has the bits of tensors outside units."""
        self.units, self.base = units, base
        hulls = {unit: _lower_hull([found for found in sensitivities if found.unit == unit]) for unit in units}
        self._fewest = {unit: hull[0].bits for unit, hull in hulls.items()}
        steps = [(before, after) for hull in hulls.values() for before, after in itertools.pairwise(hull)]
        self.upgrades = [
            after for _, after in sorted(steps, key=lambda step: (-_worth(*step), step[1].unit, step[1].bits))
        ]

    def plan(self, count: int) -> dict[str, int]:
        """The plan after the first `count` upgrades."""
        return self.plan_of(self.upgrades[:count])

    def plan_of(self, upgrades: Collection[Sensitivity]) -> dict[str, int]:
        """The plan after these upgrades.

        The upgrades of one unit are in their order.
        """
        bits = self._fewest | {upgrade.unit: upgrade.bits for upgrade in upgrades}
        return {**self.base, **{name: bits[unit] for unit, names in self.units.items() for name in names}}

    def fill(self, budget: int, count_bytes: CountBytes) -> list[Sensitivity]:
        """Upgrades by worth, without those that exceed the budget."""
        taken: list[Sensitivity] = []
        closed: set[Unit] = set()
        for upgrade in self.upgrades:
            if upgrade.unit not in closed and count_bytes(self.plan_of([*taken, upgrade])) <= budget:
                taken.append(upgrade)
            else:
                closed.add(upgrade.unit)
        return taken


def find_units(
    classes: Mapping[str, TensorClass], shapes: Mapping[str, tuple[int, ...]]
) -> dict[Unit, tuple[str, ...]]:
    """The units of a decoder and the tensors of each."""
    units: dict[Unit, list[str]] = {}
    for name, kind in classes.items():
        if kind in SEARCHED and math.prod(shapes[name]) > 0:
            units.setdefault(Unit(layer_of(name), kind), []).append(name)
    return {unit: tuple(names) for unit, names in sorted(units.items())}


def options_of(unit: Unit, config: QuantizeConfig, floats: int) -> tuple[int, ...]:
    """Numbers of bits that a unit may have, the fewest first.

    Experts are always quantized, but where the recipe overrides that.
    """
    least = max((o.bits for o in config.overrides if o.tensors == unit.tensors and unit.layer in o.layers), default=4)
    if least == 16:
        return (floats,)
    return tuple(bits for bits in (4, 8) if bits >= least) + (() if unit.tensors == "experts" else (floats,))


@dataclass(frozen=True)
class Candidates:
    """Units, the bits each may have, and how tensors are read."""

    units: Mapping[Unit, Collection[str]]
    options: Mapping[Unit, tuple[int, ...]]
    floats: int
    count_bytes: CountBytes
    read: ReadCandidate


def measure_units(
    ruler: Ruler, candidates: Candidates, progress: Progress, journal: RecordJournal
) -> list[Sensitivity]:
    """Every unit's own cost in each number of bits.

    Units in float cost nothing.

    Those in the journal are taken from it.
    """
    units, options = candidates.units, candidates.options
    found = [Sensitivity(**{**record, "unit": Unit(**record["unit"])}) for record in journal.read()]
    known = {sensitivity.unit for sensitivity in found}
    total = len(units)

    def choices(unit: Unit) -> tuple[list[int], list[Weights]]:
        quantized = [bits for bits in options[unit] if is_quantized(bits)]
        return quantized, [
            WeightsOf(units[unit], dict.fromkeys(units[unit], bits), candidates.read) for bits in quantized
        ]

    def note(unit: Unit, quantized: list[int], costs: list[Cost]) -> None:
        kls = dict(zip(quantized, (cost.kl for cost in costs), strict=True)) | {candidates.floats: 0.0}
        for bits in options[unit]:
            num_bytes = candidates.count_bytes(dict.fromkeys(units[unit], bits))
            found.append(Sensitivity(unit, bits, num_bytes, kls[bits]))
        journal.add([asdict(sensitivity) for sensitivity in found if sensitivity.unit == unit])
        progress("measuring each part in fewer bits", len({s.unit for s in found}), total)

    for unit in (unit for unit in units if unit.layer < 0 and unit not in known):
        quantized, weights = choices(unit)
        note(unit, quantized, ruler.measure_outside(weights))
    states = embed(ruler.checkpoint, ruler.blocks, torch.float32)
    for layer in range(ruler.num_layers):
        inside = [unit for unit in units if unit.layer == layer and unit not in known]
        parts = [choices(unit) for unit in inside]
        costs, states = ruler.measure_layer(layer, states, [weights for _, group in parts for weights in group])
        rest = iter(costs)
        for unit, (quantized, _) in zip(inside, parts, strict=True):
            note(unit, quantized, [next(rest) for _ in quantized])
    return found


class BitSearcher:
    """Chooses a plan by measured perplexity.

    And offers the next larger one where the weights as they finally came to be cost too much.
    """

    def __init__(
        self,
        ruler: Ruler,
        choices: BitChoices,
        sensitivities: Collection[Sensitivity],
        config: QuantizeConfig,
        count_bytes: CountBytes,
        read: ReadCandidate,
        progress: Progress,
    ) -> None:
        """Prepare the search.

        `count_bytes` of a plan of all tensors is what the whole package has.
        """
        self.ruler, self.choices, self.sensitivities, self.config = ruler, choices, tuple(sensitivities), config
        self.count_bytes, self._read, self._progress = count_bytes, read, progress
        self.reference = ruler.measure({})
        self._measured: dict[int, Cost] = {}
        self._count = 0
        self._taken: list[Sensitivity] = []

    @property
    def plan(self) -> dict[str, int]:
        """The chosen plan."""
        return self.choices.plan_of(self._taken)

    def choose(self) -> None:
        """Choose by the recipe's budget, or by its perplexity limit.

        Raises:
            ExportError: nothing keeps to the limit.
        """
        if self.config.budget is not None:
            self._taken = self.choices.fill(self.config.budget, self.count_bytes)
            return
        low, high = -1, len(self.choices.upgrades)
        if not self._keeps_limit(high):
            raise self._too_tight(self._increase(self._measure(high)))
        while high - low > 1:
            middle = (low + high) // 2
            if self._keeps_limit(middle):
                high = middle
            else:
                low = middle
        self._take(high)

    def reject(self, cost: Cost) -> bool:
        """Whether the final weights break the limit of perplexity.

        `cost` is what these weights cost. The choice is then a larger one.

        Raises:
            ExportError: there is none.
        """
        if self.config.budget is not None or self._increase(cost) <= self._limit:
            return False
        last = len(self.choices.upgrades)
        if self._count == last:
            raise self._too_tight(self._increase(cost))
        self._take(min(last, self._count + max(1, last // 16)))
        return True

    def result(self, cost: Cost) -> BitSearch:
        """The outcome, with the cost of the chosen plan's final weights.

        Some points of the front are measured for the picture.
        """
        last = len(self.choices.upgrades)
        for number in sorted({round(n * last / (_NUM_PICTURED - 1)) for n in range(_NUM_PICTURED)}):
            self._measure(number)
        points = [
            self._point(self.choices.plan(count), cost, f"{count} of {last} parts raised")
            for count, cost in self._measured.items()
        ]
        for bits in (4, 8):
            plan = {**self.choices.base, **{name: bits for names in self.choices.units.values() for name in names}}
            names = [name for names in self.choices.units.values() for name in names]
            points.append(
                self._point(plan, self.ruler.measure(WeightsOf(names, plan, self._read)), f"{bits} bits everywhere")
            )
        plan = self.plan
        chosen = _point(self.count_bytes(plan), cost, "chosen", chosen=True)
        return BitSearch(
            points=tuple(sorted([*points, chosen], key=lambda point: (point.package_bytes, point.chosen))),
            reference_figures=language_figures(self.reference.loss),
            limit=f"{self.config.budget:,} bytes"
            if self.config.budget is not None
            else f"perplexity at most {self._limit:.3%} higher",
            num_tokens=self.ruler.blocks.numel(),
            bits=_by_layer({unit: plan[next(iter(names))] for unit, names in self.choices.units.items()}),
            sensitivities=self.sensitivities,
        )

    @property
    def _limit(self) -> float:
        assert self.config.max_perplexity_increase is not None
        return self.config.max_perplexity_increase

    def _increase(self, cost: Cost) -> float:
        difference = cost.loss - self.reference.loss
        return math.expm1(difference) if not difference > _MOST_NATS else math.inf

    def _keeps_limit(self, count: int) -> bool:
        return self._increase(self._measure(count)) <= self._limit

    def _take(self, count: int) -> None:
        self._count, self._taken = count, self.choices.upgrades[:count]

    def _measure(self, count: int) -> Cost:
        """The plan's cost after `count` upgrades, on candidate weights."""
        if count not in self._measured:
            names = [name for names in self.choices.units.values() for name in names]
            self._measured[count] = self.ruler.measure(WeightsOf(names, self.choices.plan(count), self._read))
            self._progress("measuring choices of bits", len(self._measured), len(self._measured))
        return self._measured[count]

    def _point(self, plan: Plan, cost: Cost, label: str) -> SearchPoint:
        return _point(self.count_bytes(plan), cost, label, chosen=False)

    def _too_tight(self, increase: float) -> ExportError:
        return ExportError(
            f"quantize.max_perplexity_increase is {self._limit:.3%}; with experts in 8 bits and the rest as floats "
            "perplexity on the validation text "
            f"rises by {increase:.3%}; raise the limit, or let quantize.overrides keep experts of some layers as floats"
        )


def _point(package_bytes: int, cost: Cost, label: str, *, chosen: bool) -> SearchPoint:
    return SearchPoint(package_bytes, language_figures(cost.loss), label, chosen)


def _worth(before: Sensitivity, after: Sensitivity) -> float:
    """KL divergence that one byte removes."""
    return (before.kl - after.kl) / max(1, after.num_bytes - before.num_bytes)


def _lower_hull(options: list[Sensitivity]) -> list[Sensitivity]:
    """Options that are best at some price per byte.

    They are sorted by bytes, the smallest first.
    """
    hull: list[Sensitivity] = []
    for option in sorted(options, key=lambda found: (found.num_bytes, found.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _worth(hull[-2], hull[-1]) <= _worth(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _by_layer(bits: Mapping[Unit, int]) -> dict[TensorClass, tuple[int, ...]]:
    found: dict[TensorClass, list[int]] = {}
    for unit in sorted(bits):
        found.setdefault(unit.tensors, []).append(bits[unit])
    return {kind: tuple(values) for kind, values in found.items()}
