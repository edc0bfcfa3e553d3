"""The methods of quantization, applied to a checkpoint tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from export.calibration import CalibrationWalk
from export.config import QuantizeConfig
from export.errors import ExportError
from export.family import DecoderFamily, layer_of
from export.gptq import quantize_gptq
from export.journal import LayerJournal
from export.progress import Progress
from export.quantization import Quantized, dequantize, is_quantized, join, quantize, round_to_nearest
from upcycle.checkpoint import Checkpoint

_TOKENS_PER_INPUT = 2
"""Below so many tokens for each input of a matrix, second moments say too little for GPTQ (the figure is Olive's); see `quantize_tensors`."""


@dataclass
class CalibrationRecord:
    """What calibration saw: tokens of each expert by layer, and matrices of experts with too few of them for GPTQ.

    `input_scales` are those of static quantization: of what a matrix reads, by the name of its tensor; one an expert where experts that read
    different things are stacked in it.
    """

    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    num_searched: int = 0
    input_scales: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: CalibrationRecord) -> None:
        """Take in what was seen in another layer."""
        self.expert_tokens |= other.expert_tokens
        self.num_searched += other.num_searched
        self.input_scales |= other.input_scales

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> CalibrationRecord:
        """The record that `asdict` and JSON made facts of."""
        return cls(**{**facts, "expert_tokens": {int(layer): counts for layer, counts in facts["expert_tokens"].items()}})


def order_tensors(names: Mapping[str, int]) -> list[str]:
    """Tensors in the order in which `quantize_tensors` yields them: those outside of layers, then layer by layer."""
    return sorted(names, key=lambda name: (layer_of(name), name))


def quantize_tensors(
    checkpoint: Checkpoint, family: DecoderFamily | None, plan: Mapping[str, int], config: QuantizeConfig,
    scale_type: torch.dtype, blocks: torch.Tensor | None, record: CalibrationRecord, progress: Progress, journal: LayerJournal,
) -> Iterator[tuple[str, Quantized]]:  # fmt: skip
    """Quantize every tensor of `plan` (bits by name; 16 and 32 are left alone), in the order of `order_tensors`; one layer in memory at a time.

    Method gptq reads `blocks` [N, S] of token ids. A matrix that sees fewer than two tokens for each of its inputs is quantized with searched scales
    instead, errors weighed by its inputs' mean squares. Embedding and head, outside of layers, have searched scales always, and so has a model that
    no family describes (`family` None), which cannot be walked. Layers that are in the journal are taken from it.

    Raises:
        ExportError: gptq without text.
    """
    names = [name for name in order_tensors(plan) if is_quantized(plan[name])]
    in_layers = [name for name in names if layer_of(name) >= 0]
    walk = None
    if config.method == "gptq" and in_layers and family is not None:
        if blocks is None:
            raise ExportError("quantize.method is 'gptq', which learns from text, and there is none; give blocks of it, or set method to 'search'")
        walk = CalibrationWalk(checkpoint, family, blocks, config.calibrate_all_experts)
    done = 0
    for name in names if walk is None else [name for name in names if layer_of(name) < 0]:
        yield name, _quantize_alone(checkpoint, name, plan[name], config, scale_type)
        done += 1
        progress("quantizing", done, len(names))
    if walk is None:
        return
    for layer in range(checkpoint.config.num_hidden_layers):
        if (done_before := journal.read(layer)) is not None:
            found, own = done_before[0], CalibrationRecord.read(done_before[1])
        else:
            own = CalibrationRecord()
            found = _quantize_layer(walk, layer, plan, config, scale_type, own)
            journal.write(layer, found, asdict(own))
        record.add(own)
        expected = [name for name in in_layers if layer_of(name) == layer]
        assert sorted(found) == expected, f"layer {layer}: calibration knows {sorted(found)}, to be quantized are {expected}"
        for name in expected:
            yield name, found[name]
        done += len(expected)
        progress("quantizing", done, len(names))
        if layer + 1 < checkpoint.config.num_hidden_layers:
            shapes = {name: checkpoint.entries[name].shape for name in found}
            walk.advance(layer, {name: dequantize(q, shapes[name][-1], plan[name]).reshape(shapes[name]) for name, q in found.items()})


def _quantize_alone(checkpoint: Checkpoint, name: str, bits: int, config: QuantizeConfig, scale_type: torch.dtype) -> Quantized:
    weight = checkpoint.read(name).to(torch.float32).flatten(0, -2)
    if config.method == "round":
        return round_to_nearest(weight, bits, config.block_size, scale_type, config.zero_points)
    return quantize(weight, bits, config.block_size, scale_type=scale_type, zero_points=config.zero_points)


def _quantize_layer(
    walk: CalibrationWalk, layer: int, plan: Mapping[str, int], config: QuantizeConfig, scale_type: torch.dtype, record: CalibrationRecord
) -> dict[str, Quantized]:
    parts: dict[str, list[Quantized]] = {}
    for group in walk.read_layer(layer):
        wanted = [(name, rows) for name, rows in group.matrices if is_quantized(plan[name])]
        if not wanted:
            continue
        inputs = group.read()
        if group.expert is not None:
            counts = record.expert_tokens.setdefault(layer, [])
            if group.expert == len(counts):  # the first of the expert's groups
                counts.append(len(inputs))
        enough = len(inputs) >= _TOKENS_PER_INPUT * inputs.shape[1]
        hessian = inputs.T @ inputs if enough else None
        for name, rows in wanted:
            weight = walk.read_matrix(name, rows)
            if hessian is not None:
                found = quantize_gptq(weight, hessian, plan[name], config.block_size, scale_type, config.zero_points)
            else:
                record.num_searched += 1
                importance = inputs.square().mean(0) if len(inputs) else None
                found = quantize(weight, plan[name], config.block_size, importance, scale_type, config.zero_points)
            parts.setdefault(name, []).append(found)
    return {name: join(found) for name, found in parts.items()}
