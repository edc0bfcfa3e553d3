"""Methods of quantization, applied tensor by tensor."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.aim import find_aim
from dense2moe.export.quantization.assignment import Assignment
from dense2moe.export.quantization.blockwise import (
    Quantized,
    dequantize,
    is_quantized,
    join,
    quantize,
    round_to_nearest,
)
from dense2moe.export.quantization.calibration import CalibrationWalk, Group
from dense2moe.export.quantization.calibration_record import CalibrationRecord
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.ffn import RowSpan
from dense2moe.export.quantization.gptq import InputMoments, prepare_moments, quantize_gptq, quantize_together
from dense2moe.export.quantization.input_scaling import READ_TOKENS, choose_scales, scale_layer
from dense2moe.export.quantization.inputs import Inputs, Scaled
from dense2moe.export.quantization.journal import KeptLayer, LayerJournal
from dense2moe.export.quantization.order import head_name, order_tensors
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.models.parts import ATTENTION, layer_of
from dense2moe.upcycle.progress import Progress

_TOKENS_PER_INPUT = 2
"""Below so many tokens for each input of a matrix, second moments say too little for GPTQ (the figure is Olive's).

See `quantize_tensors`.
"""


_HEAD_ELEMENTS = 1 << 22
_MOMENTS_ELEMENTS = 1 << 25
"""Of the moments that are in memory at once for experts that are quantized side by side.

128 MB, or those of one expert.
"""


def quantize_tensors(
    assignment: Assignment, record: CalibrationRecord, progress: Progress, journal: LayerJournal
) -> Iterator[tuple[str, Quantized]]:
    """Quantize every tensor of an assignment, in the order of `order_tensors`.

    One layer in memory at a time. Method gptq reads the text. A matrix that sees fewer than two
    tokens for each of its inputs is quantized with searched scales instead, errors weighed by its inputs' mean squares.
    An embedding has searched scales always, unless it is the head as well, and so has a model that no family describes
    (`family` None), which cannot be walked. Where no matrix in a layer learns and inputs are scaled, a few of the
    blocks are read, by the float model. Layers that are in the journal are taken from it.

    Raises:
        ExportError: gptq without text.
    """
    checkpoint, family, plan = assignment.checkpoint, assignment.family, assignment.plan
    config, scale_type, blocks = assignment.config, assignment.scale_type, assignment.blocks
    names = [name for name in order_tensors(plan, family) if is_quantized(plan[name])]
    in_layers = [name for name in names if layer_of(name) >= 0]
    walk = None
    learns = config.correct_routers or any(config.method_of(plan[name]) == "gptq" for name in in_layers)
    if in_layers and family is not None and (learns or config.input_scaling != "none"):
        if blocks is None:
            setting, mend = _learner(config)
            raise ExportError(f"{setting}, which learns from text, and there is none; give blocks of it, or {mend}")
        text = blocks if learns else choose_blocks(blocks, math.ceil(READ_TOKENS / blocks.shape[1]))
        walk = CalibrationWalk(checkpoint, family, text, config.calibrate_all_experts, config.correct_routers)
    done = 0
    head = head_name(plan, family)
    reads_head = (
        head is not None
        and head in names
        and (config.method_of(plan[head]) == "gptq" or config.input_scaling != "none")
    )
    for name in names if walk is None else [name for name in names if layer_of(name) < 0 and name != head]:
        yield name, _quantize_alone(checkpoint, name, plan[name], config, scale_type)
        done += 1
        progress("quantizing", done, len(names))
    if walk is None:
        return
    for layer in range(checkpoint.config.num_hidden_layers):
        if (kept := journal.read(layer)) is not None:
            found, own = kept.quantized, CalibrationRecord.read(kept.facts, kept.floats)
        else:
            own = CalibrationRecord()
            found = _quantize_layer(walk, layer, assignment, own, learns, partial(_tell, progress, done, len(names)))
            journal.write(layer, KeptLayer(found, own.replaced, own.write()))
        record.add(own)
        expected = [name for name in in_layers if layer_of(name) == layer]
        assert sorted(found) == expected, (
            f"layer {layer}: calibration knows {sorted(found)}, to be quantized are {expected}"
        )
        for name in expected:
            yield name, found[name]
        done += len(expected)
        progress("quantizing", done, len(names))
        if not learns:
            if kept is not None:
                walk.pass_float(layer)
        elif layer + 1 < checkpoint.config.num_hidden_layers or reads_head:
            shapes = {name: checkpoint.entries[name].shape for name in found}
            quantized = {
                name: dequantize(q, shapes[name][-1], plan[name]).reshape(shapes[name]) for name, q in found.items()
            }
            walk.advance(layer, quantized | own.replaced)
    if head is not None and head in names:
        if reads_head:
            yield head, _quantize_head(walk, head, plan, config, scale_type, record)
        else:
            yield head, _quantize_alone(checkpoint, head, plan[head], config, scale_type)
        progress("quantizing", len(names), len(names))


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    """Report tensors of one layer."""
    progress("quantizing", before + done, total)


def _learner(config: QuantizeConfig) -> tuple[str, str]:
    """The first setting that needs text, and what to change without."""
    if config.method == "gptq":
        return "quantize.method is 'gptq'", "set method to 'search'"
    if config.correct_routers:
        return "quantize.correct_routers is true", "set it to false"
    return f"quantize.input_scaling is '{config.input_scaling}'", "set it to 'none'"


def _quantize_alone(
    checkpoint: Checkpoint, name: str, bits: int, config: QuantizeConfig, scale_type: torch.dtype
) -> Quantized:
    weight = checkpoint.read(name).to(torch.float32).flatten(0, -2)
    if config.method == "round":
        return round_to_nearest(weight, bits, config.block_size, scale_type, config.zero_points)
    return quantize(weight, bits, config.block_size, scale_type=scale_type, zero_points=config.zero_points)


def _quantize_head(
    walk: CalibrationWalk,
    name: str,
    plan: Mapping[str, int],
    config: QuantizeConfig,
    scale_type: torch.dtype,
    record: CalibrationRecord,
) -> Quantized:
    """The matrix that makes the logits, some rows at a time.

    Scaled inputs are folded into the final norm, which is then in `record`. One that is the embedding too has the error
    of each of its own values count as much as the mean of an input does. Measured at 4 bits on stories260k upcycled: KL
    1.43e-2 where searched scales have 2.16e-2, and more tokens keep their experts than by the head's moments alone.
    Nothing takes its scales in, and they are in `record` by themselves: its integers stand for the weights times them.
    """
    group, bits, is_embedding = walk.read_head(name), plan[name], name == walk.family.name("embedding")
    inputs = group.read()
    scales = (
        None
        if config.input_scaling == "none"
        else choose_scales([group], walk, plan, config, record.scaling, float(is_embedding))
    )
    if scales is not None:
        if is_embedding:
            record.column_scales[name] = scales
        else:
            norm = walk.family.name("final_norm")
            record.replaced[norm] = walk.checkpoint.read(norm).to(torch.float32) / scales
        inputs = Inputs(inputs.actual / scales, inputs.reference / scales)
    height, width = walk.checkpoint.entries[name].shape
    method = config.method_of(bits)
    learns = method == "gptq" and len(inputs.actual) >= _TOKENS_PER_INPUT * width
    aim = find_aim(inputs) if learns else None
    own = torch.ones(width) if scales is None else scales.square().reciprocal()
    hessian = (
        None if aim is None else aim.hessian + (aim.hessian.diagonal() / own).mean() * torch.diag(own) * is_embedding
    )
    moments = None if hessian is None else prepare_moments(hessian, config.block_size)
    importance = None if scales is None else inputs.actual.square().mean(0)
    found, step = [], max(1, _HEAD_ELEMENTS // width)
    for start in range(0, height, step):
        weight = walk.read_matrix(name, (start, min(start + step, height)))
        weight = weight if scales is None else weight * scales
        if aim is not None and moments is not None:
            moved = weight if is_embedding else aim.move(weight)
            found.append(quantize_gptq(moved, moments, bits, config.block_size, scale_type, config.zero_points))
        elif method == "round":
            found.append(round_to_nearest(weight, bits, config.block_size, scale_type, config.zero_points))
        else:
            found.append(quantize(weight, bits, config.block_size, importance, scale_type, config.zero_points))
    return join(found)


def _quantize_layer(
    walk: CalibrationWalk,
    layer: int,
    assignment: Assignment,
    record: CalibrationRecord,
    learns: bool,
    progress: Callable[[int], None],
) -> dict[str, Quantized]:
    """Every quantized tensor of a layer.

    Inputs come from quantized layers where anything `learns`. Or else as the float model has it. `progress` is told how
    many matrices are done, and not of the last, since the layer is not kept yet.
    """
    plan, config, scale_type = assignment.plan, assignment.config, assignment.scale_type
    scaled = Scaled() if config.input_scaling == "none" else scale_layer(walk, layer, plan, config, record.scaling)
    scarce: set[int] = set()
    parts: dict[str, list[Quantized]] = {}
    if learns:
        in_attention = [walk.family.name(part, layer) for part in ATTENTION]
        attention_learns = any(
            is_quantized(plan[name]) and config.method_of(plan[name]) == "gptq" for name in in_attention if name in plan
        )
        read = walk.read_layer(layer, scaled, attention_learns)
    else:
        read = walk.read_float(layer, scaled=scaled, moves=True)
    for groups in _batch_groups(read, walk):
        progress(len(parts))
        prepared = [matrix for group in groups for matrix in _prepare(walk, layer, group, plan, config, record, scarce)]
        for matrix, found in zip(prepared, _quantize_prepared(prepared, config, scale_type), strict=True):
            if learns:
                walk.replace(matrix.name, matrix.rows, dequantize(found, matrix.weight.shape[-1], matrix.bits))
            parts.setdefault(matrix.name, []).append(found)
    record.scarce_experts[layer] = len(scarce)
    record.replaced |= {name: tensor for name, tensor in scaled.tensors.items() if not is_quantized(plan[name])}
    if layer in walk.routers:
        record.replaced[walk.family.name("router", layer)], record.routers[layer] = walk.routers.pop(layer)
    return {name: join(found) for name, found in parts.items()}


@dataclass(frozen=True)
class _Prepared:
    """A matrix and what its quantization needs.

    The moments of what it reads, or no more than their mean squares, or nothing.
    """

    name: str
    rows: RowSpan
    bits: int
    weight: torch.Tensor
    moments: InputMoments | None
    importance: torch.Tensor | None


def _prepare(
    walk: CalibrationWalk,
    layer: int,
    group: Group,
    plan: Mapping[str, int],
    config: QuantizeConfig,
    record: CalibrationRecord,
    scarce: set[int],
) -> Iterator[_Prepared]:
    """Matrices of a group to quantize, shifted where possible.

    A matrix is shifted where the shift can be learned.

    Experts with too few tokens for it go into `scarce`.
    """
    wanted = [(name, rows) for name, rows in group.matrices if is_quantized(plan[name])]
    if not wanted:
        return
    gptq = {name for name, _ in wanted if config.method_of(plan[name]) == "gptq"}
    inputs = group.read()
    tokens, width = inputs.actual.shape
    enough = tokens >= _TOKENS_PER_INPUT * width
    if group.expert is not None:
        if group.place == "first":
            record.expert_tokens.setdefault(layer, []).append(tokens)
        if not enough:
            scarce.add(group.expert)
    if not enough and gptq:
        record.largest_lack = max(record.largest_lack, _TOKENS_PER_INPUT * width / max(1, tokens))
    aim = find_aim(inputs) if enough and gptq else None
    moments = None if aim is None else prepare_moments(aim.hessian, config.block_size)
    importance = inputs.actual.square().mean(0) if tokens else None
    for name, rows in wanted:
        weight = walk.read_matrix(name, rows)
        if aim is not None and name in gptq:
            yield _Prepared(name, rows, plan[name], aim.move(weight), moments, None)
        else:
            record.num_searched += name in gptq
            yield _Prepared(name, rows, plan[name], weight, None, importance)


def _quantize_prepared(
    prepared: Sequence[_Prepared], config: QuantizeConfig, scale_type: torch.dtype
) -> list[Quantized]:
    """Quantize matrices; learned ones of one shape go side by side."""
    found: dict[int, Quantized] = {}
    learned: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(prepared):
        if matrix.moments is not None:
            learned[matrix.weight.shape, matrix.bits].append(place)
        elif config.method_of(matrix.bits) == "round":
            found[place] = round_to_nearest(
                matrix.weight, matrix.bits, config.block_size, scale_type, config.zero_points
            )
        else:
            found[place] = quantize(
                matrix.weight, matrix.bits, config.block_size, matrix.importance, scale_type, config.zero_points
            )
    for (_, bits), places in learned.items():
        weights, moments = [prepared[place].weight for place in places], [prepared[place].moments for place in places]
        together = quantize_together(
            weights, [own for own in moments if own], bits, config.block_size, scale_type, config.zero_points
        )
        found |= dict(zip(places, together, strict=True))
    return [found[place] for place in range(len(prepared))]


def _batch_groups(groups: Iterable[Group], walk: CalibrationWalk) -> Iterator[list[Group]]:
    """Groups independent of each other, to quantize side by side.

    The first matrices of experts, then their last ones; others alone.
    """
    for is_expert, alike in itertools.groupby(groups, key=lambda group: group.expert is not None):
        if not is_expert:
            yield from ([group] for group in alike)
            continue
        both = list(alike)
        width = max(walk.checkpoint.entries[name].shape[-1] for group in both for name, _ in group.matrices)
        num_experts = max(1, _MOMENTS_ELEMENTS // (2 * width * width))
        for start in range(0, len(both), 2 * num_experts):
            some = both[start : start + 2 * num_experts]
            yield from ([group for group in some if (group.place == "first") == first] for first in (True, False))
