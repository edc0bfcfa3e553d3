"""The plan of an upcycling: from names and shapes alone.

Complete and exclusive: every row of every source tensor is used or its tensor listed as dropped, every target tensor is
written once. Nothing here reads a weight. A target tensor is a run of pieces, one after the other in the order of its
bytes, so that a piece that changes nothing is a copy of bytes from one file to another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.checkpoints.reader import DTYPES, Checkpoint, TensorEntry
from dense2moe.upcycle.checkpoints.writer import TensorSpec
from dense2moe.upcycle.errors import UpcycleError, describe_error, shorten
from dense2moe.upcycle.models.conversion import (
    COMMON_NEUTRAL,
    Conversion,
    choose_conversion,
    find_family,
    resolve_layers,
)
from dense2moe.upcycle.models.dense import DenseFamily, Ffn, Fold, Matrix
from dense2moe.upcycle.models.sparse import ExpertNames, MoeTarget, SharedNames

_HEAD = "lm_head.weight"
_WINDOW_FIELDS = {"sliding_window", "layer_types", "attention_chunk_size"}
"""What transformers' cache reads of any config, whether its class has the field or not.

See `get_layer_types_and_kwargs` (cache_utils.py, 5.23).
"""
_SCALE_ENDS = ("scale", "scale_inv", ".scales", ".qzeros", ".g_idx", ".absmax", ".quant_map", "zero_point", ".SCB")
_UNQUANTIZED = ("F64", "I64", "BOOL")


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a stored tensor; elements, where it has one dimension."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Keep:
    """The slice as it is, or with arithmetic of the dense model folded in."""

    rows: Slice
    fold: Fold | None = None


@dataclass(frozen=True)
class ExpertPart:
    """Some neurons of one FFN matrix, as one expert has them.

    `neuron_axis` is 0 in gate and up, whose rows are neurons, and 1 in down. `expert` names the expert over all layers:
    the neurons that are drawn anew are the same in its gate, up and down. `routed` is false of a shared expert.
    """

    matrix: Slice
    neuron_axis: int
    neurons: tuple[int, int]
    expert: str
    drop: float = 0.0
    noise: float = 0.0
    scale: float = 1.0
    routed: bool = True

    @property
    def num_neurons(self) -> int:
        """Neurons of the expert."""
        return self.neurons[1] - self.neurons[0]


@dataclass(frozen=True)
class Zeros:
    """Nothing but zeros: a shared expert that is silent, or its gate, whose sigmoid is then one half."""

    num_elements: int


@dataclass(frozen=True)
class SelectionBias:
    """What a gate adds to its scores for the choice of experts: zeros at first. A buffer, and no parameter."""

    num_elements: int


@dataclass(frozen=True)
class RouterRows:
    """A router's rows, each repeated `repeat` times, for the FFN number `site` of the model.

    `norms` and `embedding` say how long the vectors are that it reads; see `RouterInput`.
    """

    site: int
    num_rows: int
    repeat: int
    norms: tuple[str, ...]
    embedding: str | None


Piece = Keep | ExpertPart | Zeros | SelectionBias | RouterRows


@dataclass(frozen=True)
class Write:
    """One target tensor and the pieces that make it."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Site:
    """One FFN that becomes experts: the stack of layers that it is in, and its layer there."""

    stack: int
    layer: int


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
        """Parameters that one token meets: everything but the experts that it does not visit."""
        experts = sum(
            _count(write) for write in self.writes if isinstance(piece := write.pieces[0], ExpertPart) and piece.routed
        )
        return self.num_parameters - experts + experts * self.settings.num_experts_per_tok // self.settings.num_experts

    @property
    def keeps_function(self) -> bool:
        """Whether the mixture computes what the dense model does, whatever its router says, up to rounding."""
        experts = self.settings.experts
        return experts.kept and experts.kind != "split" and not self.conversion.target.top_1

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


def _count(write: Write) -> int:
    return 0 if isinstance(write.pieces[0], SelectionBias) else torch.Size(write.spec.shape).numel()


def plan_upcycle(checkpoint: Checkpoint, config: UpcycleConfig) -> UpcyclePlan:
    """Plan the mixture of experts that a dense checkpoint becomes.

    Raises:
        UpcycleError: the architecture, a config value or a setting has no place in the target; a number does not
            divide; tensors are missing, unknown or of another shape than the config says.
    """
    where = str(checkpoint.directory / "config.json")
    _refuse_untied(
        checkpoint, find_family(checkpoint.config.model_type, checkpoint.config.architectures, where, checkpoint.config)
    )
    conversion = choose_conversion(checkpoint.config, config, where)
    family, target = conversion.family, conversion.target
    _refuse_unknown_fields(checkpoint.config, conversion, where)
    dropped = _check_tensors(checkpoint, family)
    planner = _Planner(checkpoint, conversion, config, dropped)
    sites = planner.sites()
    writes = tuple(planner.writes(sites))
    _check_use(checkpoint, writes, dropped)
    num_layers = sum(getattr(checkpoint.config, ffn.num_layers) for ffn in family.ffns)
    target_config = _target_config(checkpoint, conversion, config, sites, planner.width)
    assert len({write.spec.name for write in writes}) == len(writes)
    assert target.count_field in target_config.to_dict()
    return UpcyclePlan(conversion, config, target_config, writes, dropped, sites, num_layers)


class _Planner:
    """The writes of one conversion."""

    def __init__(
        self, checkpoint: Checkpoint, conversion: Conversion, config: UpcycleConfig, dropped: tuple[str, ...]
    ) -> None:
        self.entries = {name: entry for name, entry in checkpoint.entries.items() if name not in dropped}
        self.source = checkpoint.config
        self.family, self.target, self.config = conversion.family, conversion.target, config
        ffn = self.family.ffns[0]
        rows = self._slice(ffn.up, 0)
        self.ffn_width = rows.stop - rows.start
        if self.ffn_width % config.num_parts:
            raise UpcycleError(
                f"{checkpoint.directory}: the FFN's width is {self.ffn_width}; it must be a multiple of "
                f"{config.num_parts} to be cut into so many "
                f"{config.experts.kind} experts"
            )
        self.width = self.ffn_width // config.num_parts

    def sites(self) -> tuple[Site, ...]:
        """Every FFN that becomes experts, in the order of the model."""
        return tuple(
            Site(stack, layer)
            for stack, ffn in enumerate(self.family.ffns)
            for layer in resolve_layers(self.config.layers, getattr(self.source, ffn.num_layers))
        )

    def writes(self, sites: tuple[Site, ...]) -> Iterator[Write]:
        """All writes: what is outside the layers first, then layer by layer."""
        yield from (
            self._move(name, name, matrix, None)
            for name, matrix in self.family.moves.items()
            if "{layer}" not in name and self._has(matrix)
        )
        numbers = {site: number for number, site in enumerate(sites)}
        for stack, (ffn, names) in enumerate(zip(self.family.ffns, self.target.experts, strict=True)):
            prefix = ffn.up.name.split("{layer}")[0]
            for layer in range(getattr(self.source, ffn.num_layers)):
                for pattern, matrix in self.family.moves.items():
                    if pattern.startswith(prefix) and "{layer}" in pattern and self._has(matrix, layer):
                        yield self._move(pattern.format(layer=layer), pattern, matrix, layer)
                if (number := numbers.get(Site(stack, layer))) is None:
                    yield from self._dense(ffn, names, layer)
                else:
                    yield from self._sparse(ffn, names, layer, number)

    def _has(self, matrix: Matrix, layer: int | None = None) -> bool:
        return matrix.name.format(layer=layer) in self.entries

    def _slice(self, matrix: Matrix, layer: int | None) -> Slice:
        entry = self.entries[matrix.name.format(layer=layer)]
        start, stop = matrix.rows(self.source) if matrix.rows else (0, entry.shape[0])
        return Slice(entry.name, start, stop)

    def _move(self, name: str, pattern: str, matrix: Matrix, layer: int | None) -> Write:
        rows = self._slice(matrix, layer)
        entry = self.entries[rows.source]
        dtype = torch.float32 if matrix.fold else DTYPES[entry.dtype]
        return Write(TensorSpec(name, dtype, (rows.stop - rows.start, *entry.shape[1:])), (Keep(rows, matrix.fold),))

    def _dense(self, ffn: Ffn, names: ExpertNames, layer: int) -> Iterator[Write]:
        for matrix, name in ((ffn.gate, names.dense_gate), (ffn.up, names.dense_up), (ffn.down, names.dense_down)):
            if matrix is not None:
                assert name is not None, "a target without dense layers was given some"
                yield self._move(name.format(layer=layer), name, matrix, layer)

    def _sparse(self, ffn: Ffn, names: ExpertNames, layer: int, site: int) -> Iterator[Write]:
        yield self._router(ffn, names, layer, site)
        count = self.config.num_experts
        if names.selection_bias is not None:
            yield Write(
                TensorSpec(names.selection_bias.format(layer=layer), torch.float32, (count,)), (SelectionBias(count),)
            )
        if names.stacked:
            assert ffn.gate is not None
            pairs = [
                self._part(matrix, 0, layer, site, expert) for expert in range(count) for matrix in (ffn.gate, ffn.up)
            ]
            downs = [self._part(ffn.down, 1, layer, site, expert) for expert in range(count)]
            hidden = self._hidden(ffn.up, layer)
            yield self._write(names.up, layer, (count, 2 * self.width, hidden), pairs)
            yield self._write(names.down, layer, (count, hidden, self.width), downs)
        else:
            for matrix, name, axis in ((ffn.gate, names.gate, 0), (ffn.up, names.up, 0), (ffn.down, names.down, 1)):
                if matrix is not None:
                    assert name is not None, "a gated FFN was given to a target without gates"
                    hidden = self._hidden(ffn.up, layer)
                    shape = (self.width, hidden) if axis == 0 else (hidden, self.width)
                    for expert in range(count):
                        yield self._write(
                            name.format(layer=layer, expert=expert),
                            layer,
                            shape,
                            [self._part(matrix, axis, layer, site, expert)],
                        )
        if self.target.shared is not None:
            yield from self._shared(ffn, self.target.shared, layer, site)

    def _hidden(self, up: Matrix, layer: int) -> int:
        return self.entries[self._slice(up, layer).source].shape[1]

    def _write(self, name: str, layer: int, shape: tuple[int, ...], pieces: list[ExpertPart]) -> Write:
        return Write(TensorSpec(name.format(layer=layer), self._dtype(pieces), shape), tuple(pieces))

    def _dtype(self, pieces: Iterable[ExpertPart]) -> torch.dtype:
        """The dtype that holds every value of all pieces."""
        return functools.reduce(
            torch.promote_types, [DTYPES[self.entries[piece.matrix.source].dtype] for piece in pieces]
        )

    def _part(self, matrix: Matrix, axis: int, layer: int, site: int, expert: int) -> ExpertPart:
        part = expert % self.config.num_parts
        neurons = (part * self.width, (part + 1) * self.width)
        experts = self.config.experts
        scale = self._down_scale() if axis == 1 else 1.0
        return ExpertPart(
            self._slice(matrix, layer), axis, neurons, f"{site}.{expert}", experts.drop, experts.noise, scale
        )

    def _down_scale(self) -> float:
        """Factor of the experts' down projections.

        The chosen weights sum to one, so of `num_parts` parts each has its share of the weight of the whole, and is
        multiplied back. A top-1 router weighs by the probability itself, 1 / num_experts in a tie. A shared expert that
        gives one half leaves one half.
        """
        scale = float(self.config.num_experts if self.target.top_1 else self.config.num_parts)
        return scale / 2 if self.config.shared_expert == "half" else scale

    def _router(self, ffn: Ffn, names: ExpertNames, layer: int, site: int) -> Write:
        router_input = ffn.router_input
        norms = [name.format(layer=layer) for name in router_input.norms]
        norms += [name.format(layer=n) for n in range(layer) for name in router_input.earlier]
        entry = self.entries[norms[0]]
        rows = RouterRows(
            site, self.config.num_router_rows, self.config.group_size, tuple(norms), router_input.embedding
        )
        spec = TensorSpec(
            names.router.format(layer=layer), DTYPES[entry.dtype], (self.config.num_experts, entry.num_elements)
        )
        return Write(spec, (rows,))

    def _shared(self, ffn: Ffn, names: SharedNames, layer: int, site: int) -> Iterator[Write]:
        """The shared expert: none (width 0 where the architecture always builds one), half of the output, or silent."""
        kind = self.config.shared_expert
        if kind == "none" and not names.required:
            return
        assert ffn.gate is not None
        hidden = self._hidden(ffn.up, layer)
        width = 0 if kind == "none" else self.ffn_width

        def part(matrix: Matrix, axis: int, scale: float = 1.0) -> ExpertPart:
            return ExpertPart(self._slice(matrix, layer), axis, (0, width), f"{site}.shared", scale=scale, routed=False)

        gate, up = part(ffn.gate, 0), part(ffn.up, 0)
        # A sigmoid of zero is the one half; without such a gate the weights themselves are halved.
        down = part(ffn.down, 1, 1.0 if names.scale else 0.5)
        if names.gate is None:
            yield self._write(names.up, layer, (2 * width, hidden), [gate, up])
        else:
            yield self._write(names.gate, layer, (width, hidden), [gate])
            yield self._write(names.up, layer, (width, hidden), [up])
        given: Piece = Zeros(hidden * width) if kind == "zero" else down
        yield Write(TensorSpec(names.down.format(layer=layer), self._dtype([down]), (hidden, width)), (given,))
        if names.scale is not None:
            yield Write(TensorSpec(names.scale.format(layer=layer), self._dtype([up]), (1, hidden)), (Zeros(hidden),))


def _refuse_untied(checkpoint: Checkpoint, family: DenseFamily) -> None:
    """Refuse a copy of the embedding with other values where the target takes the embedding in its place."""
    if not checkpoint.untied or (not checkpoint.config.is_encoder_decoder and family.moves.get(_HEAD) == Matrix(_HEAD)):
        return
    name = checkpoint.untied[0]
    raise UpcycleError(
        f"{checkpoint.entries[name].file}: tensor '{name}' differs from the embedding, so transformers uses both; a "
        "mixture made of "
        f"{family.architecture} has one for both; remove the tensor if the embedding alone is meant"
    )


def _refuse_unknown_fields(source: PreTrainedConfig, conversion: Conversion, where: str) -> None:
    """Refuse a value other than the default of a field that no table knows.

    A newer transformers may have given it a meaning.
    """
    known = {
        *conversion.carried,
        *conversion.required,
        *conversion.consumed,
        *conversion.optional,
        *conversion.neutral,
        *COMMON_NEUTRAL,
    }
    defaults = type(source)()
    for name in sorted(_WINDOW_FIELDS - set(type(source).__dataclass_fields__)):
        if getattr(source, name, None) is not None:
            raise UpcycleError(
                f"{where}: {name} is {shorten(getattr(source, name))}; {conversion.family.architecture} has no "
                "windows, but the key-value cache of "
                "transformers takes them from there, so that decoding differs from reading at once; remove the field"
            )
    for name in type(source).__dataclass_fields__:
        if (
            name not in known
            and hasattr(source, name)
            and (value := getattr(source, name)) != getattr(defaults, name, None)
        ):
            raise UpcycleError(
                f"{where}: {name} is {shorten(value)}, and what it does is not known to "
                f"{conversion.target.architecture}; remove it or set its "
                "default"
            )


def _target_config(
    checkpoint: Checkpoint, conversion: Conversion, config: UpcycleConfig, sites: tuple[Site, ...], width: int
) -> PreTrainedConfig:
    """Carry the config over from the *loaded* object.

    The two architectures' defaults differ, so absent json keys must not stay absent.
    """
    source, target = checkpoint.config, conversion.target
    fields: dict[str, Any] = {name: getattr(source, name) for name in conversion.carried}
    fields |= {name: getattr(source, name) for name in conversion.optional if hasattr(source, name)}
    fields |= dict(target.fixed)
    fields[target.count_field] = config.num_experts
    if target.top_k_field:
        fields[target.top_k_field] = config.num_experts_per_tok
    fields[target.width_field] = width
    fields |= conversion.derived(source)
    fields |= _layer_fields(checkpoint, target, sites)
    if target.shared is not None:
        whole = config.num_parts if target.shared.in_experts else width * config.num_parts
        fields[target.shared.width_field] = 0 if config.shared_expert == "none" else whole
    where = str(checkpoint.directory / "config.json")
    try:
        made: PreTrainedConfig = AutoConfig.for_model(target.model_type, **fields)
    except (
        Exception
    ) as error:  # the target's own validation: transformers raises strict dataclass errors of several kinds
        raise UpcycleError(f"{where}: {target.architecture} refuses these values: {shorten(error)}") from error
    made.architectures = [target.architecture]
    made.dtype = source.dtype
    return made


def _layer_fields(checkpoint: Checkpoint, target: MoeTarget, sites: tuple[Site, ...]) -> dict[str, Any]:
    """How the target says which layers have experts, and how wide the others are."""
    source = checkpoint.config
    match target.partial_layers:
        case "none":
            return {}
        case "list":
            sparse = {site.layer for site in sites}
            dense = [layer for layer in range(source.num_hidden_layers) if layer not in sparse]
            return {"mlp_only_layers": dense, "intermediate_size": source.intermediate_size}
        case "last":
            return {"first_k_dense_replace": sites[0].layer, "intermediate_size": source.intermediate_size}
        case "step":
            # Layers 1, 1 + step, …, or all for step 1, where step = layers // sparse layers (its config class, 5.23).
            fields = {}
            for stack, (name, count) in enumerate(
                (("encoder", source.num_layers), ("decoder", source.num_decoder_layers))
            ):
                chosen = [site.layer for site in sites if site.stack == stack]
                step = count // len(chosen)
                if chosen != [n for n in range(count) if step == 1 or n % step == 1]:
                    raise UpcycleError(
                        f"upcycle.layers: {target.architecture} cannot have experts in the {name}'s layers {chosen} "
                        "alone; use all or every-2"
                    )
                fields[f"num_sparse_{name}_layers"] = len(chosen)
            return fields


def _check_tensors(checkpoint: Checkpoint, family: DenseFamily) -> tuple[str, ...]:
    """Compare the stored tensors with those of transformers' own model of this config.

    Returns the names that are dropped.
    """
    _check_depth(checkpoint, family)
    expected, tied = _expected(checkpoint.config, family.architecture, str(checkpoint.directory / "config.json"))
    num_layers = max(getattr(checkpoint.config, ffn.num_layers) for ffn in family.ffns)
    droppable = {pattern.format(layer=layer) for pattern in family.dropped for layer in range(num_layers)}
    droppable |= (
        tied  # copies of the embedding with equal values: with others, `open_checkpoint` says that nothing is tied
    )
    dropped = tuple(sorted(droppable & set(checkpoint.entries)))
    for name, entry in checkpoint.entries.items():
        if name not in dropped:
            _refuse_quantized(entry, checkpoint.directory)
    for name, shape in expected.items():
        if name not in checkpoint.entries:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' is missing; by config.json it must be there with shape "
                f"{list(shape)}"
            )
        found = checkpoint.entries[name].shape
        if found != shape:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' has shape {list(found)}; by config.json it must be "
                f"{list(shape)}"
            )
    for name in checkpoint.entries:
        if name not in expected and name not in dropped:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' has no place in {family.architecture}; it would be lost; "
                "remove it"
            )
    return dropped


def _refuse_quantized(entry: TensorEntry, directory: Path) -> None:
    """Refuse integers and narrow floats, and the scales beside them, which the weights are wrong without."""
    if entry.dtype not in DTYPES:
        hint = "" if entry.dtype in _UNQUANTIZED else "; dequantize the model first, or give it as it was before"
        raise UpcycleError(
            f"{directory}: tensor '{entry.name}' is stored as {entry.dtype}; it must be one of "
            f"{', '.join(DTYPES)}{hint}"
        )
    if entry.name.endswith(_SCALE_ENDS):
        raise UpcycleError(
            f"{directory}: tensor '{entry.name}' belongs to quantized weights, which are wrong without it; "
            "dequantize the model first, or give it "
            "as it was before"
        )


def _check_depth(checkpoint: Checkpoint, family: DenseFamily) -> None:
    """Refuse a config that says no layers, or more than the files can hold, before a model of it is built."""
    for ffn in family.ffns:
        count = getattr(checkpoint.config, ffn.num_layers)
        if count < 1:
            raise UpcycleError(
                f"{checkpoint.directory / 'config.json'}: {ffn.num_layers} is {count}; it must be at least 1"
            )
        if count > len(checkpoint.entries):
            raise UpcycleError(
                f"{checkpoint.directory / 'config.json'}: {ffn.num_layers} is {count}; the files hold "
                f"{len(checkpoint.entries)} tensors, too few"
            )


def expected_shapes(config: PreTrainedConfig, architecture: str, where: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model of this config, tied copies left out; allocates nothing.

    Raises:
        UpcycleError: transformers cannot build a model of the config, which `where` names.
    """
    return _expected(config, architecture, where)[0]


def _expected(
    config: PreTrainedConfig, architecture: str, where: str
) -> tuple[Mapping[str, tuple[int, ...]], set[str]]:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, architecture)(config)
    # torch and transformers raise many kinds for values that make no model, plain asserts and KeyErrors among them
    except Exception as error:
        raise UpcycleError(
            f"{where}: transformers cannot build {architecture} of these values ({describe_error(error)}); correct "
            "the file"
        ) from error
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}, tied


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
        assert name in dropped or position == _num_rows(entry), f"the tables leave out rows of {name}"


def _num_rows(entry: TensorEntry) -> int:
    return entry.shape[0]
