"""Static 8-bit quantization: row-wise weights, input ranges measured on text.

A product x W' of a float graph becomes s_x s_n (x_q W_q'): the weights of output n are integers times s_n, x is rounded
to integers times s_x, and both scales are constants of the file. Providers that compute in 8 bits want it so, as
QuantizeLinear and DequantizeLinear around a plain MatMul, with symmetric ranges: every zero point is 0, every scale
positive, integers of weights go from -127 to 127.

An activation's range is that of one tensor, so few large values make all steps coarse. `clip` weighs that: it takes the
range, up to the largest magnitude, in which the squared error of rounding and of cutting off is smallest (Nagel et al.,
A White Paper on Neural Network Quantization, 2021, section 3.1). On the embedded model, fine-tuned, it costs 0.3 % of
perplexity, and the largest magnitude 1.9 %. Ranges are read off a histogram of magnitudes, so that a layer's text is
never held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, assert_never

import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.assignment import Assignment
from dense2moe.export.quantization.blockwise import Quantized, dequantize, is_quantized, round_to_nearest
from dense2moe.export.quantization.calibration import CalibrationWalk, Group
from dense2moe.export.quantization.calibration_record import CalibrationRecord
from dense2moe.export.quantization.journal import KeptLayer, LayerJournal
from dense2moe.export.quantization.order import head_name, order_tensors
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import layer_of
from dense2moe.upcycle.progress import Progress

BITS = 8
ActivationRange = Literal["largest", "clip"]
_LARGEST_INTEGER = (1 << (BITS - 1)) - 1
_BINS = 4096  # sixteen and more for each integer
_CANDIDATES = 64  # ranges that are tried, at equal distances


class Magnitudes:
    """A histogram of magnitudes whose range doubles as needed.

    Its upper end is a power of two.
    """

    def __init__(self) -> None:
        self.largest, self.end = 0.0, 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Count a tensor's values.

        Raises:
            ValueError: some are not finite.
        """
        if not x.numel():
            return
        magnitudes = x.abs().float()
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise ValueError("values must be finite")
        self.largest = max(self.largest, largest)
        if largest > self.end:
            end = math.ldexp(1.0, math.frexp(largest)[1])
            if self.end:
                for _ in range(round(math.log2(end / self.end))):
                    self.counts = torch.cat(
                        [self.counts.view(-1, 2).sum(1), torch.zeros(_BINS // 2, dtype=torch.float64)]
                    )
            self.end = end
        if self.end:
            self.counts += torch.histc(magnitudes, _BINS, 0.0, self.end).double()

    def choose_scale(self, how: ActivationRange) -> float:
        """The positive scale for integers -127 to 127.

        1 where every value was zero.
        """
        if not self.largest:
            return 1.0
        match how:
            case "largest":
                bound = self.largest
            case "clip":
                bound = self._clip()
            case _:
                assert_never(how)
        return float(torch.tensor(bound / _LARGEST_INTEGER, dtype=torch.float32))

    def _clip(self) -> float:
        values = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.end / _BINS)
        best = (math.inf, self.largest)
        for step in range(_CANDIDATES, 0, -1):  # the widest first: of equal errors it is taken
            bound = self.largest * step / _CANDIDATES
            scale = bound / _LARGEST_INTEGER
            rounded = (values / scale).round().clamp(max=_LARGEST_INTEGER) * scale
            best = min(
                best, (float((self.counts * (values - rounded).square()).sum()), bound), key=lambda pair: pair[0]
            )
        return best[1]


def quantize_static(
    assignment: Assignment, record: CalibrationRecord, progress: Progress, journal: LayerJournal
) -> Iterator[tuple[str, Quantized]]:
    """Quantize every tensor of an assignment, in the order of `order_tensors`.

    One layer in memory at a time. Weights [N, K] have one scale a row, codes [N, 1, K]. When all have been yielded,
    `record.input_scales` has those of what they read, on the text: one for all experts of a layer,
    which read the same states, and one for each expert's down projection. An expert that sees no token has the widest
    range of its layer. Scales of layers that are in the journal are taken from it.

    Raises:
        ExportError: no text, a model that no family describes, or one whose states are not finite.
    """
    checkpoint, family, plan = assignment.checkpoint, assignment.family, assignment.plan
    config, blocks = assignment.config, assignment.blocks
    if family is None:
        raise ExportError(
            f"{checkpoint.directory}: model_type {checkpoint.config.model_type} is traced, and cannot be calibrated; "
            "leave out 'int8-qdq'"
        )
    if blocks is None:
        raise ExportError(
            "variant 'int8-qdq' measures activations on text, and there is none; give blocks of it, or leave it out"
        )
    names = [name for name in order_tensors(plan, family) if is_quantized(plan[name])]
    head = head_name(plan, family)
    outside = [name for name in names if layer_of(name) < 0 and name != head]
    walk, how = CalibrationWalk(checkpoint, family, blocks, config.calibrate_all_experts), config.activation_range
    done = 0
    for name in outside:
        yield name, _round_rows(walk.read_matrix(name, None))
        done += 1
        progress("quantizing", done, len(names))
    for layer in range(checkpoint.config.num_hidden_layers):
        if (kept := journal.read(layer)) is not None:
            own = CalibrationRecord.read(kept.facts, kept.floats)
        else:
            own = CalibrationRecord()
            _measure(walk, layer, plan, how, own)
            journal.write(layer, KeptLayer({}, {}, own.write()))
        record.add(own)
        replaced = {}
        for name in (name for name in names if layer_of(name) == layer):
            shape = checkpoint.entries[name].shape
            found = _round_rows(walk.read_matrix(name, None))
            yield name, found
            replaced[name] = dequantize(found, shape[-1], BITS).reshape(shape)
            done += 1
            progress("quantizing", done, len(names))
        walk.advance(layer, replaced)
    if head is not None and head in names:
        yield head, _round_rows(walk.read_matrix(head, None))
        progress("quantizing", len(names), len(names))
        record.input_scales[head] = [_measure_head(walk, how)]


def _round_rows(weight: torch.Tensor) -> Quantized:
    """A weight [N, K] with one positive scale a row.

    A row of zeros has scale 1.
    """
    found = round_to_nearest(weight, BITS, weight.shape[1])
    return replace(found, scales=torch.where(found.scales == 0, torch.ones(()), found.scales))


def _measure(
    walk: CalibrationWalk, layer: int, plan: Mapping[str, int], how: ActivationRange, record: CalibrationRecord
) -> None:
    """Input scales of the layer's quantized matrices."""
    scales = record.input_scales
    of_experts, of_down = Magnitudes(), list[Magnitudes]()
    downs, firsts = list[str](), dict[str, None]()
    for group in walk.read_layer(layer):
        names = [name for name, _ in group.matrices if is_quantized(plan[name])]
        if not names:
            continue
        inputs = group.read().actual
        if group.expert is None:
            magnitudes = Magnitudes()
            _add(magnitudes, inputs, walk, layer, group)
            scales |= {name: [magnitudes.choose_scale(how)] for name in names}
        elif _is_down(walk.family, group, layer):
            of_down.append(Magnitudes())
            _add(of_down[-1], inputs, walk, layer, group)
            downs += names
        else:
            _add(of_experts, inputs, walk, layer, group)
            firsts |= dict.fromkeys(names)
            record.expert_tokens.setdefault(layer, []).append(len(inputs))
    scales |= {name: [of_experts.choose_scale(how)] for name in firsts}
    widest = max((magnitudes.choose_scale(how) for magnitudes in of_down if magnitudes.largest), default=1.0)
    for name, magnitudes in zip(downs, of_down, strict=True):
        scales.setdefault(name, []).append(magnitudes.choose_scale(how) if magnitudes.largest else widest)


def _add(magnitudes: Magnitudes, inputs: torch.Tensor, walk: CalibrationWalk, layer: int, group: Group) -> None:
    try:
        magnitudes.add(inputs)
    except ValueError as error:
        name = group.matrices[0][0]
        raise ExportError(
            f"{walk.checkpoint.directory}: what '{name}' reads in layer {layer} on calibration text is not finite"
        ) from error


def _is_down(family: Architecture, group: Group, layer: int) -> bool:
    assert family.routed is not None
    return group.matrices[0][0] == family.routed.down.format(layer=layer, expert=group.expert)


def _measure_head(walk: CalibrationWalk, how: ActivationRange) -> float:
    """The head's input scale: the normed states after all layers."""
    weight = walk.read_matrix(walk.family.name("final_norm"), None)[0]
    x = walk.states
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + walk.checkpoint.config.rms_norm_eps) * weight
    magnitudes = Magnitudes()
    magnitudes.add(normed)
    return magnitudes.choose_scale(how)
