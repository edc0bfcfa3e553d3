"""The plan of growth: one more expert in every sparse layer.

From names and shapes alone: what the mixture has stays, and what is added stands behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dense2moe.upcycle.building.agreement import check_mixture_agreement
from dense2moe.upcycle.building.choice import find_refusals
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.pieces import Slice
from dense2moe.upcycle.building.planner import EXPERT_OF
from dense2moe.upcycle.building.source import check_tensors
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES, READABLE, TensorEntry
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models.architecture import Architecture, Conversion
from dense2moe.upcycle.models.parts import Part
from dense2moe.upcycle.models.table import (
    CONVERSIONS,
    DENSE_FAMILIES,
    TARGETS,
    find_architecture,
    find_family,
    list_conversions,
)


@dataclass(frozen=True)
class Extension:
    """A tensor to be written: the mixture's bytes, and what follows them.

    kept: the mixture's tensor; None of a tensor that is the new expert's alone.
    part: which part is added; None where nothing is.
    rows: of an expert's part, the source's rows, one run after the other.
    """

    spec: TensorSpec
    kept: TensorEntry | None
    part: Part | None = None
    rows: tuple[Slice, ...] = ()

    @property
    def num_new_parameters(self) -> int:
        """Values that the mixture did not have; a selection bias counts none."""
        kept = 0 if self.kept is None else self.kept.num_elements
        return 0 if self.part == "selection_bias" else math.prod(self.spec.shape) - kept


@dataclass(frozen=True)
class GrowthPlan:
    """What will be written, in this order, and where experts are."""

    target: Architecture
    num_experts: int
    layers: tuple[int, ...]
    extensions: tuple[Extension, ...]


def plan_growth(mixture: Checkpoint, source: Checkpoint, scale: float | None = None) -> GrowthPlan:
    """Plan one more expert, from names and shapes alone.

    Raises:
        UpcycleError: the mixture is none that the table of architectures knows, or has no experts of a whole FFN; the
            source is sparse, or not of the mixture's base; a tensor is missing or has another shape than it must.
    """
    target = _find_target(mixture)
    assert target.experts is not None, f"{target.architecture} is dense"
    conversion = _find_conversion(source, target)
    check_mixture_agreement(mixture, source, conversion)
    check_tensors(source, conversion.family)
    width = _check_width(mixture, source, conversion, scale)
    num_experts = int(getattr(mixture.config, target.experts.count_field))
    num_layers = target.stacks[0].count_layers(mixture.config)
    layers = tuple(layer for layer in range(num_layers) if target.has_experts(layer, mixture.entries))
    if not layers:
        raise UpcycleError(f"{mixture.directory}: has no router in any layer; give a mixture that has experts")
    added: dict[str, Extension] = {}
    for layer in layers:
        added |= _extend_router(mixture, target, layer, num_experts)
        added |= _extend_experts(mixture, source, conversion, layer, num_experts, width)
    extensions: list[Extension] = []
    for name, entry in mixture.entries.items():
        extension = added.pop(name, None)
        if extension is None or extension.kept is None:
            extensions.append(Extension(TensorSpec(name, _dtype(entry), entry.shape), entry))
        if extension is not None:
            extensions.append(extension)
    assert not added, f"{sorted(added)} have no place"
    return GrowthPlan(target, num_experts, layers, tuple(extensions))


def _find_target(mixture: Checkpoint) -> Architecture:
    """The mixture's architecture, if an expert can be added to it."""
    config, where = mixture.config, str(mixture.directory / "config.json")
    fitting = [target for target in TARGETS if target.experts is not None and not target.experts.top_1]
    if config.model_type not in [target.model_type for target in fitting]:
        dense = any(family.model_type == config.model_type for family in DENSE_FAMILIES)
        remedy = "; upcycle it first" if dense else ""
        raise UpcycleError(
            f"{where}: model_type is {shorten(config.model_type)}; an expert can be added to "
            f"{', '.join(target.model_type for target in fitting)}{remedy}"
        )
    if (num_groups := getattr(config, "n_group", 1)) != 1:
        raise UpcycleError(
            f"{where}: n_group is {num_groups}; must be 1 to add an expert: groups of experts must stay equally large"
        )
    return find_architecture(config)


def _find_conversion(source: Checkpoint, target: Architecture) -> Conversion:
    """How the source's family becomes the mixture's architecture."""
    where = str(source.directory)
    family = find_family(source.config.model_type, source.config.architectures, where, source.config)
    rows = [row for row in list_conversions(family) if row.target.model_type == target.model_type]
    if not rows:
        names = ", ".join(row.family.model_type for row in CONVERSIONS if row.target.model_type == target.model_type)
        raise UpcycleError(
            f"{where}: model_type is {family.model_type}; for a mixture that is {target.model_type} it must be one of "
            f"{names}; give a model of the mixture's base"
        )
    (conversion,) = rows
    if conversion.target is not target:
        raise UpcycleError(
            f"{where}: architectures is {family.architecture}, which becomes {conversion.target.architecture}; the "
            f"mixture is {target.architecture}; give a model with the same head"
        )
    shared = conversion.experts.shared
    always = shared is not None and shared.width_field is None
    settings = UpcycleConfig(shared_expert="zero" if always else "none")
    if reasons := find_refusals(conversion, source.config, settings):
        raise UpcycleError(f"{where}: {'; '.join(reasons)}")
    return conversion


def _check_width(mixture: Checkpoint, source: Checkpoint, conversion: Conversion, scale: float | None) -> int:
    """The width of an expert and of the source's FFN."""
    where, config, experts = mixture.directory / "config.json", mixture.config, conversion.experts
    rows = _slice(source, conversion, "ffn_up", 0)
    width, found = int(getattr(config, experts.width_field)), rows.stop - rows.start
    if width != found:
        raise UpcycleError(
            f"{where}: {experts.width_field} is {width}; the FFN of {source.directory} is {found} wide; both must be "
            "equal: no expert can be added to granular or split ones, which are parts of an FFN"
        )
    shared_field = None if experts.shared is None else experts.shared.width_field or experts.width_field
    shared = 0 if shared_field is None else int(getattr(config, shared_field) or 0)
    if shared and scale is None:
        raise UpcycleError(
            f"{where}: {shared_field} is {shared}; beside a shared expert the new one "
            "needs a scale: 0.5 where the shared expert was made to give half of the output, 1 where it was silent"
        )
    return width


def _slice(source: Checkpoint, conversion: Conversion, part: Part, layer: int) -> Slice:
    """The rows of a part of the source's FFN."""
    matrix = conversion.family.stacks[0].parts[part]
    name = matrix.name.format(layer=layer)
    start, stop = matrix.rows(source.config) if matrix.rows else (0, source.entries[name].shape[0])
    return Slice(name, start, stop)


def _extend_router(
    mixture: Checkpoint, target: Architecture, layer: int, num_experts: int
) -> Iterator[tuple[str, Extension]]:
    """A router and its selection bias, by name."""
    parts: tuple[Part, ...] = ("router", "selection_bias")
    for part in parts:
        name = target.find(part, layer)
        if name is not None and (part == "router" or target.gate(mixture.config).selection_bias):
            as_row = target.stacks[0].parts[part].as_row
            shape = (num_experts, int(mixture.config.hidden_size)) if part == "router" else (num_experts,)
            entry = _find(mixture, name, (1, *shape) if as_row else shape)
            yield name, _lengthen(entry, part, axis=int(as_row))


def _extend_experts(
    mixture: Checkpoint, source: Checkpoint, conversion: Conversion, layer: int, num_experts: int, width: int
) -> Iterator[tuple[str, Extension]]:
    """A layer's experts: their tensors, and what follows each of them."""
    tensors: dict[str, list[Part]] = {}
    for part in (part for part in EXPERT_OF if conversion.target.find(part) is not None):
        tensors.setdefault(conversion.target.name(part), []).append(part)
    hidden = int(mixture.config.hidden_size)
    for pattern, parts in tensors.items():
        rows = tuple(_slice(source, conversion, EXPERT_OF[part], layer) for part in parts)
        shape = (hidden, width) if parts == ["expert_down"] else (len(parts) * width, hidden)
        if conversion.target.is_stacked:
            name = pattern.format(layer=layer)
            yield name, _lengthen(_find(mixture, name, (num_experts, *shape)), parts[0], rows)
            continue
        names = [pattern.format(layer=layer, expert=expert) for expert in range(num_experts + 1)]
        last = [_find(mixture, name, shape) for name in names[:-1]][-1]
        yield names[-2], Extension(TensorSpec(names[-1], _dtype(last), shape), None, parts[0], rows)


def _find(mixture: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorEntry:
    """A tensor of the mixture, which must have this shape."""
    entry = mixture.entries.get(name)
    if entry is None or entry.shape != shape:
        found = "is missing" if entry is None else f"has shape {list(entry.shape)}"
        raise UpcycleError(
            f"{mixture.directory}: tensor '{name}' {found}; by config.json it must have shape {list(shape)}; write the "
            "mixture again"
        )
    if entry.dtype not in DTYPES:
        raise UpcycleError(
            f"{mixture.directory}: tensor '{name}' is stored as {entry.dtype}; it must be one of {', '.join(DTYPES)}; "
            "give the mixture as it was before it was quantized"
        )
    return entry


def _lengthen(entry: TensorEntry, part: Part, rows: tuple[Slice, ...] = (), axis: int = 0) -> Extension:
    """A tensor with one more row, matrix or element."""
    shape = tuple(size + (number == axis) for number, size in enumerate(entry.shape))
    return Extension(TensorSpec(entry.name, _dtype(entry), shape), entry, part, rows)


def _dtype(entry: TensorEntry) -> torch.dtype:
    return READABLE[entry.dtype]
