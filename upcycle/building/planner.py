"""The writes of one conversion, part by part."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from dense2moe.upcycle.building.choice import resolve_layers
from dense2moe.upcycle.building.config import READ_STD, UpcycleConfig
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Merged,
    Piece,
    RouterKeys,
    RouterRows,
    SelectionBias,
    Site,
    Slice,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.router_input import list_norms, reads_residual
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion, Stack
from dense2moe.upcycle.models.parts import Matrix, Part

EXPERT_OF: Mapping[Part, Part] = {
    "expert_gate": "ffn_gate",
    "expert_up": "ffn_up",
    "expert_down": "ffn_down",
    "expert_gate_bias": "ffn_gate_bias",
    "expert_up_bias": "ffn_up_bias",
    "expert_down_bias": "ffn_down_bias",
}
"""Parts of an expert, in the order of their rows in a tensor of several, and the same parts of an FFN."""
_SHARED_OF: Mapping[Part, Part] = {
    "shared_gate": "ffn_gate",
    "shared_up": "ffn_up",
    "shared_down": "ffn_down",
    "shared_gate_bias": "ffn_gate_bias",
    "shared_up_bias": "ffn_up_bias",
    "shared_down_bias": "ffn_down_bias",
}
_DENSE: frozenset[Part] = frozenset(EXPERT_OF.values())
_SPARSE: frozenset[Part] = frozenset(
    {"router", "router_query", "selection_bias", "shared_scale", *EXPERT_OF, *_SHARED_OF}
)


@dataclass(frozen=True)
class _Layer:
    """One layer of the source.

    Its stack, its number, its FFN's number among those that become experts, and how many neurons that has.
    """

    stack: Stack
    number: int
    site: int | None
    ffn_width: int

    @property
    def parts(self) -> Mapping[Part, Matrix]:
        """Its parts, as all layers of its stack have them."""
        return self.stack.parts


class Planner:
    """The writes of one conversion, of a base and its sources.

    All checkpoints have the same names and shapes.
    """

    def __init__(
        self,
        checkpoints: tuple[Checkpoint, ...],
        conversion: Conversion,
        config: UpcycleConfig,
        dropped: frozenset[str],
    ) -> None:
        base = checkpoints[0]
        self.entries = [
            {name: entry for name, entry in checkpoint.entries.items() if name not in dropped}
            for checkpoint in checkpoints
        ]
        self.source = base.config
        self.family, self.target, self.config = conversion.family, conversion.target, config
        self.experts, self.keeps_rest = conversion.experts, conversion.keeps_rest
        self.owners = find_owners(config, len(checkpoints) - 1)
        self.ffn_widths = tuple(self._ffn_width(stack) for stack in self.family.stacks)
        for width in self.ffn_widths:
            if width % config.num_parts:
                raise UpcycleError(
                    f"{base.directory}: the FFN's width is {width}; it must be a multiple of "
                    f"{config.num_parts} to be cut into {config.experts.kind} experts; choose another "
                    "upcycle.num_experts or granularity"
                )
        self.widths = tuple(width // config.num_parts for width in self.ffn_widths)

    def _ffn_width(self, stack: Stack) -> int:
        """Neurons of a stack's FFNs; 0 without such layers."""
        if stack.count_layers(self.source) == 0:
            return 0
        matrix = stack.parts["ffn_up"]
        rows = self._slice(matrix, 0)
        return self.entries[0][rows.source].shape[1] if matrix.transposed else rows.stop - rows.start

    def sites(self) -> tuple[Site, ...]:
        """Every FFN that becomes experts, in the order of the model."""
        return tuple(
            Site(number, layer)
            for number, stack in enumerate(self.family.stacks)
            if (depth := stack.count_layers(self.source))
            for layer in resolve_layers(self.config.layers, depth)
        )

    def leaves_out(self, checkpoint: int, name: str) -> bool:
        """Whether the settings give a checkpoint's tensor no place in the mixture.

        A FFN of the base that is no expert; and all but the FFNs of a source, where the rest is the base's.
        """
        part = self._ffn_tensors.get(name)
        if checkpoint > 0:
            return part is None and self.config.merging.method == "base"
        if part is None or 0 in self.owners:
            return False
        silent = self.config.shared_expert == "zero" and part in ("ffn_down", "ffn_down_bias")
        return silent or self.config.shared_expert == "none"

    @functools.cached_property
    def _ffn_tensors(self) -> dict[str, Part]:
        """The tensors, in the sources, of FFNs that become experts."""
        return {
            matrix.name.format(layer=site.layer): part
            for site in self.sites()
            for part, matrix in self.family.stacks[site.stack].parts.items()
            if part in _DENSE
        }

    def writes(self, sites: tuple[Site, ...]) -> Iterator[Write]:
        """All writes: what is outside the layers first, then layer by layer."""
        if self.keeps_rest:
            for name in self.entries[0]:
                if name not in self._ffn_tensors:
                    yield from self._move(name, Matrix(name), None)
        for part, matrix in self.target.outside.items():
            yield from self._move(matrix.name, self.family.outside.get(part), None)
        numbers = {site: number for number, site in enumerate(sites)}
        for number, (stack, target) in enumerate(zip(self.family.stacks, self.target.stacks, strict=True)):
            tensors = _group_by_name(target.parts)
            for layer in range(stack.count_layers(self.source)):
                own = _Layer(stack, layer, numbers.get(Site(number, layer)), self.ffn_widths[number])
                yield from self._layer(tensors, own)

    def _layer(self, tensors: Mapping[str, tuple[Part, ...]], layer: _Layer) -> Iterator[Write]:
        """The writes of one layer, by the target's tensors."""
        for pattern, parts in tensors.items():
            if layer.site is None:
                if parts[0] not in _SPARSE:
                    yield from self._move(pattern, layer.parts.get(parts[0]), layer.number)
            elif parts[0] in EXPERT_OF:
                yield from self._experts(pattern, parts, layer, layer.site)
            elif parts[0] in _SPARSE:
                yield from self._sparse(pattern.format(layer=layer.number), parts, layer, layer.site)
            elif parts[0] not in _DENSE:
                yield from self._move(pattern, layer.parts.get(parts[0]), layer.number)

    def _sparse(self, name: str, parts: tuple[Part, ...], layer: _Layer, site: int) -> Iterator[Write]:
        """The writes of a sparse layer beside its experts."""
        match parts[0]:
            case "router":
                yield self._router(name, layer, site)
            case "router_query":
                if self.config.router.form != "linear":
                    yield self._router_query(name, layer, site)
            case "selection_bias":
                count = self.config.num_experts
                shape = (1, count) if self.target.stacks[0].parts["selection_bias"].as_row else (count,)
                yield Write(TensorSpec(name, torch.float32, shape), (SelectionBias(count),))
            case _ if self.config.shared_expert != "none" or (self.experts.shared and self.experts.shared.required):
                if parts[0] == "shared_scale" or self._has(_SHARED_OF[parts[0]], layer):
                    yield self._shared(name, parts, layer, site)

    def _slice(self, matrix: Matrix, layer: int | None, checkpoint: int = 0) -> Slice:
        entry = self.entries[0][matrix.name.format(layer=layer)]
        start, stop = matrix.rows(self.source) if matrix.rows else (0, entry.num_rows)
        if matrix.half is not None:
            start, stop = (0, stop // 2) if matrix.half == "first" else (stop // 2, stop)
        return Slice(entry.name, start, stop, checkpoint)

    def _move(self, pattern: str, matrix: Matrix | None, layer: int | None) -> Iterator[Write]:
        """The sources' same part, kept or merged, if there is one."""
        if matrix is None or matrix.name.format(layer=layer) not in self.entries[0]:
            return
        rows = self._slice(matrix, layer)
        merged = len(self.entries) > 1 and self.config.merging.method != "base"
        dtype = torch.float32 if matrix.fold else self._dtype(rows.source, range(len(self.entries) if merged else 1))
        whole = self.entries[0][rows.source].shape
        shape = (rows.stop - rows.start, *whole[1:]) if whole else ()
        piece = Merged(rows, matrix.fold) if merged else Keep(rows, matrix.fold)
        yield Write(TensorSpec(pattern.format(layer=layer), dtype, shape), (piece,))

    def _experts(self, pattern: str, parts: tuple[Part, ...], layer: _Layer, site: int) -> Iterator[Write]:
        """The experts' tensors of one name: one each, or one stacked.

        In a stacked one, each expert's parts follow each other.
        """
        if not self._has(EXPERT_OF[parts[0]], layer):
            yield from self._no_bias(pattern, parts, layer)
            return
        count, shape = self.config.num_experts, self._shape(parts, layer, layer.ffn_width // self.config.num_parts)
        pieces = [[self._part(EXPERT_OF[part], layer, site, expert) for part in parts] for expert in range(count)]
        if "{expert}" in pattern:
            for expert, own in enumerate(pieces):
                yield self._write(pattern.format(layer=layer.number, expert=expert), shape, own)
        else:
            all_pieces = [piece for own in pieces for piece in own]
            yield self._write(pattern.format(layer=layer.number), (count, *shape), all_pieces)

    def _no_bias(self, pattern: str, parts: tuple[Part, ...], layer: _Layer) -> Iterator[Write]:
        """Zeros for a bias that an FFN lacks beside others."""
        has_any = self._has("ffn_up_bias", layer) or self._has("ffn_down_bias", layer)
        if self.keeps_rest and EXPERT_OF[parts[0]].endswith("_bias") and has_any:
            shape = self._shape(parts, layer, layer.ffn_width // self.config.num_parts)
            dtype = self._dtype(layer.parts["ffn_up"].name.format(layer=layer.number), (0,))
            spec = TensorSpec(pattern.format(layer=layer.number), dtype, (self.config.num_experts, *shape))
            yield Write(spec, (Zeros(math.prod(spec.shape)),))

    def _has(self, part: Part, layer: _Layer) -> bool:
        """Whether a layer's FFN has a part: biases are there or not."""
        matrix = layer.parts.get(part)
        return matrix is not None and matrix.name.format(layer=layer.number) in self.entries[0]

    def _shape(self, parts: tuple[Part, ...], layer: _Layer, width: int) -> tuple[int, ...]:
        """Shape of one expert's parts, one after the other.

        The expert has `width` neurons.
        """
        hidden = self._hidden(layer)
        match parts[0]:
            case "expert_down" | "shared_down":
                return (hidden, width)
            case "expert_down_bias" | "shared_down_bias":
                return (hidden,)
            case "expert_gate_bias" | "expert_up_bias" | "shared_gate_bias" | "shared_up_bias":
                return (len(parts) * width,)
            case _:
                return (len(parts) * width, hidden)

    def _hidden(self, layer: _Layer) -> int:
        matrix = layer.parts["ffn_up"]
        shape = self.entries[0][self._slice(matrix, layer.number).source].shape
        return shape[0] if matrix.transposed else shape[1]

    def _write(self, name: str, shape: tuple[int, ...], pieces: list[ExpertPart]) -> Write:
        return Write(TensorSpec(name, self._dtype_of(pieces), shape), tuple(pieces))

    def _dtype_of(self, pieces: Iterable[ExpertPart]) -> torch.dtype:
        """The dtype that holds every value of all pieces."""
        dtypes = [self._dtype(piece.matrix.source, (piece.matrix.checkpoint,)) for piece in pieces]
        return functools.reduce(torch.promote_types, dtypes)

    def _dtype(self, name: str, checkpoints: Iterable[int]) -> torch.dtype:
        """The dtype that holds a tensor of all these checkpoints."""
        return functools.reduce(
            torch.promote_types, [DTYPES[self.entries[number][name].dtype] for number in checkpoints]
        )

    def _part(self, of: Part, layer: _Layer, site: int, expert: int) -> ExpertPart:
        experts, part = self.config.experts, expert % self.config.num_parts
        width = layer.ffn_width // self.config.num_parts
        matrix = layer.parts[of]
        rows = self._slice(matrix, layer.number, self.owners[expert])
        name, neurons = f"{site}.{expert}", (part * width, (part + 1) * width)
        match of:
            case "ffn_down":
                scale = self._down_scale()
            case "ffn_down_bias":  # no neuron's own, so each part of an FFN has all of it: their weights sum to 1
                return ExpertPart(rows, 0, (0, rows.stop - rows.start), name, scale=self._bias_scale())
            case _:
                scale = 1.0
        noise = 0.0 if of.endswith("_bias") else experts.noise
        return ExpertPart(
            rows, _neuron_axis(of), neurons, name, experts.drop, noise, scale, transposed=matrix.transposed
        )

    def _down_scale(self) -> float:
        """Factor of the experts' down projections.

        The chosen weights sum to one, so of `num_parts` parts each has its share of the weight of the whole, and is
        multiplied back. A top-1 router weighs by the probability itself, 1 / num_experts in a tie. A shared expert that
        gives one half leaves one half.
        """
        scale = float(self.config.num_experts if self.experts.top_1 else self.config.num_parts)
        return scale / 2 if self.config.shared_expert == "half" else scale

    def _bias_scale(self) -> float:
        """Factor of the biases of the experts' down projections."""
        return self._down_scale() / (1 if self.experts.top_1 else self.config.num_parts)

    def _router(self, name: str, layer: _Layer, site: int) -> Write:
        router, count, repeat = self.config.router, self.config.num_router_rows, self.config.group_size
        if router.form != "linear":
            shape = (self.config.num_experts, router.size)
            keys = RouterKeys(count, repeat, router.std / READ_STD[router.form])
            return Write(TensorSpec(name, self._router_dtype(layer), shape), (keys,))
        shape = (self.config.num_experts, self._hidden(layer))
        return Write(TensorSpec(name, self._router_dtype(layer), shape), (self._rows(layer, site, count, repeat),))

    def _router_query(self, name: str, layer: _Layer, site: int) -> Write:
        """A router's first matrix; what it gives varies by 1."""
        rows = self._rows(layer, site, self.config.router.size, 1, std=1.0)
        shape = (self.config.router.size, self._hidden(layer))
        return Write(TensorSpec(name, self._router_dtype(layer), shape), (rows,))

    def _rows(self, layer: _Layer, site: int, count: int, repeat: int, std: float | None = None) -> RouterRows:
        norms = list_norms(layer.stack, layer.number, self.entries[0])
        embedding = self.family.outside["embedding"].name if reads_residual(layer.stack) else None
        return RouterRows(site, count, repeat, norms, embedding, std)

    def _router_dtype(self, layer: _Layer) -> torch.dtype:
        norms = list_norms(layer.stack, layer.number, self.entries[0])
        first = norms[0].rows.source if norms else layer.parts["ffn_up"].name.format(layer=layer.number)
        return self._dtype(first, (0,))

    def _shared(self, name: str, parts: tuple[Part, ...], layer: _Layer, site: int) -> Write:
        """The shared expert: of width 0, half of the output, or silent."""
        kind, hidden = self.config.shared_expert, self._hidden(layer)
        width = 0 if kind == "none" else layer.ffn_width
        # a sigmoid of zero is the one half; without such a gate the weights themselves are halved
        half = 1.0 if self.target.find("shared_scale") else 0.5

        def part(of: Part) -> ExpertPart:
            matrix = layer.parts[of]
            rows = self._slice(matrix, layer.number)
            scale = half if of in ("ffn_down", "ffn_down_bias") and kind == "half" else 1.0
            neurons = (0, rows.stop - rows.start) if of == "ffn_down_bias" else (0, width)
            axis = _neuron_axis(of)
            own = f"{site}.shared"
            return ExpertPart(rows, axis, neurons, own, scale=scale, routed=False, transposed=matrix.transposed)

        match parts[0]:
            case "shared_scale":
                return Write(TensorSpec(name, self._dtype_of([part("ffn_up")]), (1, hidden)), (Zeros(hidden),))
            case "shared_down" | "shared_down_bias":
                down, shape = part(_SHARED_OF[parts[0]]), self._shape(parts, layer, width)
                given: Piece = Zeros(math.prod(shape)) if kind == "zero" else down
                return Write(TensorSpec(name, self._dtype_of([down]), shape), (given,))
            case _:
                return self._write(name, self._shape(parts, layer, width), [part(_SHARED_OF[own]) for own in parts])


def find_owners(config: UpcycleConfig, num_sources: int) -> tuple[int, ...]:
    """The number of the checkpoint that each routed expert is made of.

    0 is the base, then come the sources in order. Experts of one source follow each other, and so do those of one copy
    of its FFN.

    Raises:
        UpcycleError: the experts cannot be divided evenly among the sources, or a setting cannot be had with sources,
            or without.
    """
    if num_sources == 0:
        if config.base_expert != "none":
            raise UpcycleError(
                f"upcycle.base_expert is {config.base_expert}; it needs sources beside the base: give some, or "
                "leave it out"
            )
        return (0,) * config.num_experts
    if config.experts.kind == "split":
        raise UpcycleError(
            "upcycle.experts.kind is split; it cuts one FFN into experts, and sources have one each: use copies or "
            "granular"
        )
    if config.shared_expert != "none" and config.base_expert != "shared":
        raise UpcycleError(
            f"upcycle.shared_expert is {config.shared_expert}; where there are sources the shared expert is the base's "
            "FFN: say so by upcycle.base_expert shared"
        )
    owners = range(0 if config.base_expert == "routed" else 1, num_sources + 1)
    if config.num_router_rows % len(owners):
        whose = f"{num_sources} sources{' and the base' if config.base_expert == 'routed' else ''}"
        groups = "groups of granular experts" if config.group_size > 1 else "experts"
        raise UpcycleError(
            f"upcycle.num_experts is {config.num_experts}, {config.num_router_rows} {groups}; they must be divided "
            f"evenly among {whose}"
        )
    share = config.num_experts // len(owners)
    return tuple(owner for owner in owners for _ in range(share))


def _group_by_name(parts: Mapping[Part, Matrix]) -> dict[str, tuple[Part, ...]]:
    """The tensors of a layer, each with the parts in it."""
    found: dict[str, tuple[Part, ...]] = {}
    for part, matrix in parts.items():
        found[matrix.name] = (*found.get(matrix.name, ()), part)
    return found


def _neuron_axis(part: Part) -> int:
    """The axis of an expert's part whose indices are its neurons."""
    return 1 if part == "ffn_down" else 0
