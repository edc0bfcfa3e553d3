"""A checkpoint's integers and its twin, written to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.assignment import Assignment
from dense2moe.export.quantization.blockwise import Quantized, is_quantized
from dense2moe.export.quantization.calibration_record import CalibrationRecord
from dense2moe.export.quantization.calibration_size import count_calibration_tokens
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.journal import LayerJournal
from dense2moe.export.quantization.methods import quantize_tensors
from dense2moe.export.quantization.order import head_name, order_tensors
from dense2moe.export.quantization.packing import Packing, integer_specs
from dense2moe.export.quantization.parameters import empty_model
from dense2moe.export.quantization.static import quantize_static
from dense2moe.export.quantization.twin import COLUMN_SCALES, STEM, read_dequantized
from dense2moe.export.variant import STATIC, Device, ElementType, Variant, element_type, float_type
from dense2moe.upcycle.checkpoints.headers import index_tensors
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.checkpoints.module_names import name_for_files
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import TensorEntry, read_tensor
from dense2moe.upcycle.checkpoints.writer import TensorSpec, write_tensors
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import TensorClass
from dense2moe.upcycle.progress import Progress

_INTEGERS, _CODES = "integers", ".codes"
_SHARD_BYTES = 5_000_000_000
_TORCH_TYPES: dict[ElementType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Quantization:
    """What is quantized, how, and where it is written."""

    checkpoint: Checkpoint
    family: Architecture | None
    classes: Mapping[str, TensorClass]
    variant: Variant
    config: QuantizeConfig
    device: Device
    blocks: torch.Tensor | None
    output: Path
    progress: Progress
    scratch: Path | None

    @property
    def computes_in(self) -> ElementType:
        """The graph's element type, to which scales are rounded."""
        return element_type(self.variant, self.device)

    @property
    def packing(self) -> Packing:
        """The layout of the integers."""
        return Packing.of(self.variant, self.config, self.device)

    def integer_specs(self, plan: Mapping[str, int]) -> list[TensorSpec]:
        """A plan's stored integers, in the order of making."""
        return [
            spec
            for name in order_tensors(plan, self.family)
            if is_quantized(plan[name])
            for spec in integer_specs(
                name, self.checkpoint.entries[name].shape, plan[name], self.packing, self.has_column_scales(name)
            )
        ]

    def has_column_scales(self, name: str) -> bool:
        """Whether a matrix's integers come with input scales.

        Of a head that is the embedding, where inputs are scaled.
        """
        return (
            self.config.input_scaling != "none"
            and self.family is not None
            and name == self.family.name("embedding") == head_name(self.classes, self.family)
        )


def choose_text(blocks: torch.Tensor, job: Quantization) -> torch.Tensor:
    """The blocks [N, S] that calibration reads, evenly spread."""
    return choose_blocks(blocks, count_calibration_tokens(job.config, job.checkpoint.config) // blocks.shape[1])


def write_integers(
    job: Quantization, plan: Mapping[str, int], output: Path
) -> tuple[dict[str, TensorEntry], CalibrationRecord]:
    """Quantize by a plan into the empty folder `output`.

    Returns where integers are.
    """
    record, specs = CalibrationRecord(), job.integer_specs(plan)
    if not specs:
        return {}, record
    text = None if job.blocks is None else choose_text(job.blocks, job)
    journal = LayerJournal(job.scratch, plan, job.config.model_dump_json())
    quantize = quantize_static if job.variant == STATIC else quantize_tensors
    assignment = Assignment(job.checkpoint, job.family, plan, job.config, job.packing.scale_type, text)
    quantized = quantize(assignment, record, job.progress, journal)
    write_tensors(output, specs, _integer_tensors(job, quantized, record), _SHARD_BYTES, stem=_INTEGERS)
    return index_tensors(output, _INTEGERS), record


def write_twin(job: Quantization, plan: dict[str, int]) -> CalibrationRecord:
    """Write the checkpoint with the values of a plan's integers.

    And of these the scales, from which both can be told.
    """
    for old in job.output.glob(f"{STEM}*.safetensors*"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=job.output) as folder:
        integers, record = write_integers(job, plan, Path(folder))
        files = _name_for_files(job.checkpoint)
        specs = [TensorSpec(files[name], torch.float32, entry.shape) for name, entry in job.checkpoint.entries.items()]
        tensors = _twin_tensors(job, integers, plan, record.replaced)
        write_tensors(job.output, specs, ((files[name], tensor) for name, tensor in tensors), _SHARD_BYTES)
        kept = [spec for spec in job.integer_specs(plan) if not spec.name.endswith(_CODES)]
        if kept:
            write_tensors(
                job.output,
                kept,
                ((spec.name, read_tensor(integers[spec.name])) for spec in kept),
                _SHARD_BYTES,
                stem=STEM,
            )
    return record


def _name_for_files(checkpoint: Checkpoint) -> dict[str, str]:
    """What each tensor is called in a file.

    A mixture of ours has been opened by its modules' names.
    """
    if not is_own(checkpoint.config.model_type):
        return {name: name for name in checkpoint.entries}
    return name_for_files(empty_model(checkpoint.config, checkpoint.entries), checkpoint.entries)


def _integer_tensors(
    job: Quantization, quantized: Iterator[tuple[str, Quantized]], record: CalibrationRecord
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, found in quantized:
        if not torch.isfinite(found.scales).all():
            raise _beyond_float16(job.checkpoint, name, job.checkpoint.read(name).to(torch.float32))
        narrow = replace(found, scales=found.scales.to(job.packing.scale_type))
        yield from ((f"{name}.{part}", tensor) for part, tensor in narrow.parts().items())
        if job.has_column_scales(name):
            width = job.checkpoint.entries[name].shape[-1]
            yield f"{name}.{COLUMN_SCALES}", record.column_scales.get(name, torch.ones(width))


def _twin_tensors(
    job: Quantization, integers: Mapping[str, TensorEntry], plan: dict[str, int], replaced: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint, narrow = job.checkpoint, _TORCH_TYPES[float_type(job.variant, job.device)]
    for number, (name, bits) in enumerate(plan.items(), 1):
        if is_quantized(bits):
            shape = checkpoint.entries[name].shape
            yield name, read_dequantized(name, integers, shape, bits)
        else:
            weight = (replaced[name] if name in replaced else checkpoint.read(name)).to(torch.float32)
            rounded = weight.to(narrow).to(torch.float32) if bits == 16 else weight
            if not torch.isfinite(rounded).all():
                raise (
                    _beyond_float16(checkpoint, name, weight)
                    if narrow == torch.float16
                    else _beyond_bfloat16(checkpoint, name, weight)
                )
            yield name, rounded
        job.progress("writing the twin", number, len(plan))


def _beyond_float16(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> ExportError:
    return ExportError(
        f"{checkpoint.directory}: tensor '{name}' holds {float(weight.abs().max()):.6g}; float16 reaches "
        f"{torch.finfo(torch.float16).max:.0f}; "
        "leave out the variants in float16, which are 'float16' and with export.device 'cuda' the quantized ones"
    )


def _beyond_bfloat16(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> ExportError:
    reach = torch.finfo(torch.bfloat16).max
    return ExportError(
        f"{checkpoint.directory}: tensor '{name}' holds {float(weight.abs().max()):.6g}; bfloat16 reaches "
        f"{reach:.6g}; leave out 'bfloat16'"
    )
