"""The plan of an upcycling, from names and shapes alone.

For each part of the target, the piece of the source's same part. Complete and exclusive: every row of every source
tensor is used or its tensor listed as dropped, every target tensor is written once. Nothing here reads a weight. A
target tensor is a run of pieces, one after the other in the order of its bytes, so that a piece that changes nothing is
a copy of bytes from one file to another. In the FFN's place stand:

1. the router, of rows that are drawn or read from hidden states, and its selection bias, of zeros;
2. experts, each of some or all neurons of the FFN: its gate of the FFN's gate, and so for up and down;
3. a shared expert, of the FFN as well, with zeros for its down projection or for the vector that scales it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from dense2moe.upcycle.building.choice import choose_conversion, resolve_layers
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Piece,
    RouterRows,
    SelectionBias,
    Site,
    Slice,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.source import check_tensors, refuse_unknown_fields, refuse_untied
from dense2moe.upcycle.building.target_config import make_target_config
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.parts import Matrix, Part
from dense2moe.upcycle.models.table import find_conversion, find_family

_DENSE: frozenset[Part] = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
_EXPERT_OF: Mapping[Part, Part] = {"expert_gate": "ffn_gate", "expert_up": "ffn_up", "expert_down": "ffn_down"}
_SHARED_OF: Mapping[Part, Part] = {"shared_gate": "ffn_gate", "shared_up": "ffn_up", "shared_down": "ffn_down"}
_SPARSE: frozenset[Part] = frozenset({"router", "selection_bias", "shared_scale", *_EXPERT_OF, *_SHARED_OF})


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be written, in this order."""

    conversion: Conversion
    settings: UpcycleConfig
    target_config: PreTrainedConfig
    writes: tuple[Write, ...]
    dropped: tuple[str, ...]
    sites: tuple[Site, ...]
    num_layers: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle everything but the conversion, which holds functions.

        The other process takes the conversion from the table of conversions.
        """
        known = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "conversion"}
        return _restore_plan, (self.conversion.family.architecture, self.conversion.target.architecture, known)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights written."""
        return sum(write.spec.num_bytes for write in self.writes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the mixture."""
        return sum(_count(write) for write in self.writes)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but unvisited experts."""
        experts = sum(
            _count(write) for write in self.writes if isinstance(piece := write.pieces[0], ExpertPart) and piece.routed
        )
        return self.num_parameters - experts + experts * self.settings.num_experts_per_tok // self.settings.num_experts

    @property
    def keeps_function(self) -> bool:
        """Whether the function is kept whatever the router says, within rounding."""
        experts = self.settings.experts
        return experts.kept and experts.kind != "split" and not self.conversion.experts.top_1

    @property
    def keeps_function_at_zero(self) -> bool:
        """Whether it does with a zero router.

        Parts of one FFN must all be chosen then, and a tie of all must not mix parts of several copies.
        """
        experts, k = self.settings.experts, self.settings.num_experts_per_tok
        return experts.kept and (experts.kind == "copies" or k == self.settings.num_experts)

    @property
    def bitwise_at_zero(self) -> bool:
        """Whether it does so bit for bit, where torch's activation allows it.

        ½x + ½x = x, unless ½x is smaller than the dtype's normal numbers.
        """
        plain = self.settings.experts.kind == "copies" and self.settings.shared_expert != "half"
        return (
            self.keeps_function_at_zero
            and plain
            and self.settings.num_experts_per_tok <= 2
            and self.conversion.zero_router == "bitwise"
        )


def _restore_plan(family: str, target: str, known: dict[str, Any]) -> UpcyclePlan:
    return UpcyclePlan(conversion=find_conversion(family, target), **known)


def _count(write: Write) -> int:
    return 0 if isinstance(write.pieces[0], SelectionBias) else torch.Size(write.spec.shape).numel()


def plan_upcycle(checkpoint: Checkpoint, config: UpcycleConfig) -> UpcyclePlan:
    """Plan the mixture of experts that a dense checkpoint becomes.

    Raises:
        UpcycleError: the architecture, a config value or a setting has no place in the target; a number does not
            divide; tensors are missing, unknown or of another shape than the config says.
    """
    where = str(checkpoint.directory / "config.json")
    refuse_untied(
        checkpoint, find_family(checkpoint.config.model_type, checkpoint.config.architectures, where, checkpoint.config)
    )
    conversion = choose_conversion(checkpoint.config, config, where)
    family = conversion.family
    refuse_unknown_fields(checkpoint.config, conversion, where)
    dropped = check_tensors(checkpoint, family)
    planner = _Planner(checkpoint, conversion, config, dropped)
    sites = planner.sites()
    writes = tuple(planner.writes(sites))
    _check_use(checkpoint, writes, dropped)
    num_layers = sum(getattr(checkpoint.config, stack.num_layers) for stack in family.stacks)
    target_config = make_target_config(checkpoint, conversion, config, sites, planner.width)
    assert len({write.spec.name for write in writes}) == len(writes)
    assert conversion.experts.count_field in target_config.to_dict()
    return UpcyclePlan(conversion, config, target_config, writes, dropped, sites, num_layers)


@dataclass(frozen=True)
class _Layer:
    """One layer of the source.

    Its parts, its number, and its FFN's number among those that become experts.
    """

    parts: Mapping[Part, Matrix]
    number: int
    site: int | None


class _Planner:
    """The writes of one conversion."""

    def __init__(
        self, checkpoint: Checkpoint, conversion: Conversion, config: UpcycleConfig, dropped: tuple[str, ...]
    ) -> None:
        self.entries = {name: entry for name, entry in checkpoint.entries.items() if name not in dropped}
        self.source = checkpoint.config
        self.family, self.target, self.config = conversion.family, conversion.target, config
        self.experts = conversion.experts
        rows = self._slice(self.family.stacks[0].parts["ffn_up"], 0)
        self.ffn_width = rows.stop - rows.start
        if self.ffn_width % config.num_parts:
            raise UpcycleError(
                f"{checkpoint.directory}: the FFN's width is {self.ffn_width}; it must be a multiple of "
                f"{config.num_parts} to be cut into {config.experts.kind} experts; choose another upcycle.num_experts "
                "or granularity"
            )
        self.width = self.ffn_width // config.num_parts

    def sites(self) -> tuple[Site, ...]:
        """Every FFN that becomes experts, in the order of the model."""
        return tuple(
            Site(number, layer)
            for number, stack in enumerate(self.family.stacks)
            for layer in resolve_layers(self.config.layers, getattr(self.source, stack.num_layers))
        )

    def writes(self, sites: tuple[Site, ...]) -> Iterator[Write]:
        """All writes: what is outside the layers first, then layer by layer."""
        for part, matrix in self.target.outside.items():
            yield from self._move(matrix.name, self.family.outside.get(part), None)
        numbers = {site: number for number, site in enumerate(sites)}
        for number, (stack, target) in enumerate(zip(self.family.stacks, self.target.stacks, strict=True)):
            tensors = _group_by_name(target.parts)
            for layer in range(getattr(self.source, stack.num_layers)):
                yield from self._layer(tensors, _Layer(stack.parts, layer, numbers.get(Site(number, layer))))

    def _layer(self, tensors: Mapping[str, tuple[Part, ...]], layer: _Layer) -> Iterator[Write]:
        """The writes of one layer, by the target's tensors."""
        for pattern, parts in tensors.items():
            if layer.site is None:
                if parts[0] not in _SPARSE:
                    yield from self._move(pattern, layer.parts.get(parts[0]), layer.number)
            elif parts[0] in _EXPERT_OF:
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
            case "selection_bias":
                count = self.config.num_experts
                yield Write(TensorSpec(name, torch.float32, (count,)), (SelectionBias(count),))
            case _ if self.config.shared_expert != "none" or (self.experts.shared and self.experts.shared.required):
                yield self._shared(name, parts, layer, site)

    def _slice(self, matrix: Matrix, layer: int | None) -> Slice:
        entry = self.entries[matrix.name.format(layer=layer)]
        start, stop = matrix.rows(self.source) if matrix.rows else (0, entry.shape[0])
        return Slice(entry.name, start, stop)

    def _move(self, pattern: str, matrix: Matrix | None, layer: int | None) -> Iterator[Write]:
        """The source's same part; nothing where the checkpoint has none."""
        if matrix is None or matrix.name.format(layer=layer) not in self.entries:
            return
        rows = self._slice(matrix, layer)
        entry = self.entries[rows.source]
        dtype = torch.float32 if matrix.fold else DTYPES[entry.dtype]
        spec = TensorSpec(pattern.format(layer=layer), dtype, (rows.stop - rows.start, *entry.shape[1:]))
        yield Write(spec, (Keep(rows, matrix.fold),))

    def _experts(self, pattern: str, parts: tuple[Part, ...], layer: _Layer, site: int) -> Iterator[Write]:
        """The experts' tensors of one name: one each, or one stacked.

        In a stacked one, each expert's parts follow each other.
        """
        count, hidden = self.config.num_experts, self._hidden(layer)
        shape = (hidden, self.width) if parts == ("expert_down",) else (len(parts) * self.width, hidden)
        pieces = [[self._part(_EXPERT_OF[part], layer, site, expert) for part in parts] for expert in range(count)]
        if "{expert}" in pattern:
            for expert, own in enumerate(pieces):
                yield self._write(pattern.format(layer=layer.number, expert=expert), shape, own)
        else:
            all_pieces = [piece for own in pieces for piece in own]
            yield self._write(pattern.format(layer=layer.number), (count, *shape), all_pieces)

    def _hidden(self, layer: _Layer) -> int:
        return self.entries[self._slice(layer.parts["ffn_up"], layer.number).source].shape[1]

    def _write(self, name: str, shape: tuple[int, ...], pieces: list[ExpertPart]) -> Write:
        return Write(TensorSpec(name, self._dtype(pieces), shape), tuple(pieces))

    def _dtype(self, pieces: Iterable[ExpertPart]) -> torch.dtype:
        """The dtype that holds every value of all pieces."""
        return functools.reduce(
            torch.promote_types, [DTYPES[self.entries[piece.matrix.source].dtype] for piece in pieces]
        )

    def _part(self, of: Part, layer: _Layer, site: int, expert: int) -> ExpertPart:
        part = expert % self.config.num_parts
        neurons = (part * self.width, (part + 1) * self.width)
        axis, experts = _neuron_axis(of), self.config.experts
        matrix = self._slice(layer.parts[of], layer.number)
        scale = self._down_scale() if of == "ffn_down" else 1.0
        return ExpertPart(matrix, axis, neurons, f"{site}.{expert}", experts.drop, experts.noise, scale)

    def _down_scale(self) -> float:
        """Factor of the experts' down projections.

        The chosen weights sum to one, so of `num_parts` parts each has its share of the weight of the whole, and is
        multiplied back. A top-1 router weighs by the probability itself, 1 / num_experts in a tie. A shared expert that
        gives one half leaves one half.
        """
        scale = float(self.config.num_experts if self.experts.top_1 else self.config.num_parts)
        return scale / 2 if self.config.shared_expert == "half" else scale

    def _router(self, name: str, layer: _Layer, site: int) -> Write:
        norms, embedding = self._router_input(layer)
        entry = self.entries[norms[0]]
        rows = RouterRows(site, self.config.num_router_rows, self.config.group_size, norms, embedding)
        return Write(TensorSpec(name, DTYPES[entry.dtype], (self.config.num_experts, entry.num_elements)), (rows,))

    def _router_input(self, layer: _Layer) -> tuple[tuple[str, ...], str | None]:
        """Norms, and the embedding, that set the router input's size.

        The norm before the FFN, or, where norms follow attention and FFN, all that were added to the residual stream.
        """
        if (before := layer.parts.get("ffn_norm")) is not None:
            return (before.name.format(layer=layer.number),), None
        after = [layer.parts[part].name for part in ("attention_post_norm", "ffn_post_norm")]
        earlier = [name.format(layer=number) for number in range(layer.number) for name in after]
        return (after[0].format(layer=layer.number), *earlier), self.family.outside["embedding"].name

    def _shared(self, name: str, parts: tuple[Part, ...], layer: _Layer, site: int) -> Write:
        """The shared expert: of width 0, half of the output, or silent."""
        kind, hidden = self.config.shared_expert, self._hidden(layer)
        width = 0 if kind == "none" else self.ffn_width
        # a sigmoid of zero is the one half; without such a gate the weights themselves are halved
        half = 1.0 if self.target.find("shared_scale") else 0.5

        def part(of: Part) -> ExpertPart:
            matrix = self._slice(layer.parts[of], layer.number)
            scale = half if of == "ffn_down" else 1.0
            return ExpertPart(matrix, _neuron_axis(of), (0, width), f"{site}.shared", scale=scale, routed=False)

        match parts[0]:
            case "shared_scale":
                return Write(TensorSpec(name, self._dtype([part("ffn_up")]), (1, hidden)), (Zeros(hidden),))
            case "shared_down":
                down = part("ffn_down")
                given: Piece = Zeros(hidden * width) if kind == "zero" else down
                return Write(TensorSpec(name, self._dtype([down]), (hidden, width)), (given,))
            case _:
                return self._write(name, (len(parts) * width, hidden), [part(_SHARED_OF[own]) for own in parts])


def _group_by_name(parts: Mapping[Part, Matrix]) -> dict[str, tuple[Part, ...]]:
    """The tensors of a layer, each with the parts in it."""
    found: dict[str, tuple[Part, ...]] = {}
    for part, matrix in parts.items():
        found[matrix.name] = (*found.get(matrix.name, ()), part)
    return found


def _neuron_axis(part: Part) -> int:
    return 1 if part == "ffn_down" else 0


def _check_use(checkpoint: Checkpoint, writes: tuple[Write, ...], dropped: tuple[str, ...]) -> None:
    """Every row of every source tensor goes somewhere.

    And what the FFN's experts do not share goes to one place alone.
    """
    used: dict[str, set[tuple[int, int]]] = {}
    kept: list[tuple[str, int, int, bool]] = []
    for write in writes:
        for piece in write.pieces:
            match piece:
                case Keep(rows=rows):
                    kept.append((rows.source, rows.start, rows.stop, piece.fold is None))
                    used.setdefault(rows.source, set()).add((rows.start, rows.stop))
                case ExpertPart(matrix=rows):
                    used.setdefault(rows.source, set()).add((rows.start, rows.stop))
                case Zeros() | SelectionBias() | RouterRows():
                    pass
    assert len(kept) == len(set(kept)), "the tables move one slice to two places"
    for name, entry in checkpoint.entries.items():
        position = 0
        for start, stop in sorted(used.get(name, ())):
            assert start == position, f"the tables leave out rows {position} to {start} of {name}"
            position = stop
        assert name in dropped or position == entry.shape[0], f"the tables leave out rows of {name}"
