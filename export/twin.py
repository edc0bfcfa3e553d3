"""The quantized checkpoint: integers and scales, and the torch model that computes with the same values.

The output directory is a plain Hugging Face checkpoint in float32 whose weights are the dequantized ones, so transformers alone can run exactly
what the ONNX file will hold: the *twin*. Beside it `quantized.safetensors` keeps the integers and scales that the graph packs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from export.config import QuantizeConfig, Variant
from export.errors import ExportError
from export.family import DecoderFamily, TensorClass, find_decoder_family, find_refusal
from export.parameters import classify_tensors
from export.progress import Progress
from export.quantization import Quantized, dequantize, num_blocks, quantize
from upcycle.checkpoint import Checkpoint, TensorEntry, copy_companions, index_tensors, open_checkpoint, read_rows, read_tensor
from upcycle.shards import TensorSpec, write_tensors

SCHEME_NAME = "quantization.json"
_STEM = "quantized"
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class QuantizeFacts:
    """What was quantized: bits of each tensor class, bytes of the experts and the share of them that is quantized."""

    bits: dict[TensorClass, int]
    block_size: int
    expert_bytes: int
    quantized_expert_share: float
    quantized_bytes: int
    num_quantized_tensors: int


def class_bits(variant: Variant, config: QuantizeConfig) -> dict[TensorClass, int]:
    """Bits of each tensor class; 32 is not quantized. Routers, norms and biases always are 32."""
    if variant == "float32":
        return {"experts": 32, "attention": 32, "embedding": 32, "router": 32, "norm": 32, "bias": 32}
    own = 8 if variant == "int8" else 4

    def choose(setting: str | int) -> int:
        return own if setting == "variant" else 32 if setting == 16 else max(own, int(setting))

    attention, embedding = choose(config.attention_bits), choose(config.embedding_bits)
    return {"experts": own, "attention": attention, "embedding": embedding, "router": 32, "norm": 32, "bias": 32}


def plan_classes(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorClass]:
    """The class of every tensor: by the family's names where there is a builder, by the model's modules where it has to be traced.

    Raises:
        ExportError: neither knows a tensor.
    """
    if find_refusal(config) is not None:
        return classify_tensors(config, shapes)
    family = find_decoder_family(config)
    return {name: family.classify(name) for name in shapes}


def plan_bits(shapes: Mapping[str, tuple[int, ...]], classes: Mapping[str, TensorClass], bits: Mapping[TensorClass, int]) -> dict[str, int]:
    """Bits of every tensor by name; 32 is not quantized. A tensor without elements, as of a shared expert of width 0, has nothing to quantize."""
    return {name: bits[classes[name]] if math.prod(shape) else 32 for name, shape in shapes.items()}


def quantize_checkpoint(source: Path, output: Path, variant: Variant, config: QuantizeConfig, progress: Progress) -> QuantizeFacts:
    """Write the twin of the mixture-of-experts checkpoint in `source`, and its integers, into `output`; one tensor in memory at a time.

    Raises:
        ExportError: the architecture is not covered, or an expert would stay unquantized.
    """
    checkpoint = open_checkpoint(source)
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    classes, bits = plan_classes(checkpoint.config, shapes), class_bits(variant, config)
    plan = plan_bits(shapes, classes, bits)
    checkpoint.config.dtype = torch.float32
    checkpoint.config.save_pretrained(output)
    copy_companions(source, output)
    integer_specs = [
        spec for name, width in plan.items() if width < 32 for spec in _integer_specs(name, checkpoint.entries[name].shape, width, config.block_size)
    ]
    if integer_specs:
        write_tensors(output, integer_specs, _integer_tensors(checkpoint, plan, config.block_size, progress), _SHARD_BYTES, stem=_STEM)
    integers = index_tensors(output, _STEM) if integer_specs else {}
    specs = [TensorSpec(name, torch.float32, entry.shape) for name, entry in checkpoint.entries.items()]
    write_tensors(output, specs, _twin_tensors(checkpoint, integers, plan, progress), _SHARD_BYTES)
    experts = [name for name in plan if classes[name] == "experts" and checkpoint.entries[name].num_elements]
    sizes = {name: checkpoint.entries[name].num_elements for name in experts}
    share = sum(sizes[name] for name in experts if plan[name] < 32) / max(1, sum(sizes.values()))
    if variant != "float32" and share < 1:
        raise ExportError(f"{source}: only {share:.1%} of the expert weights could be quantized; all of them must be")
    facts = QuantizeFacts(
        bits=bits,
        block_size=config.block_size,
        expert_bytes=_stored_bytes(experts, checkpoint, plan, config.block_size),
        quantized_expert_share=share,
        quantized_bytes=sum(spec.num_bytes for spec in integer_specs),
        num_quantized_tensors=len(integer_specs) // 2,
    )
    scheme = {"variant": variant, "tensors": {name: width for name, width in plan.items() if width < 32}, **asdict(facts)}
    (output / SCHEME_NAME).write_text(json.dumps(scheme, indent=2) + "\n", encoding="utf-8")
    return facts


def estimate_bytes(shapes: Mapping[str, tuple[int, ...]], family: DecoderFamily, variant: Variant, config: QuantizeConfig) -> tuple[int, int]:
    """Weight bytes of a variant's ONNX package and of its quantize artifact (twin and integers), from names and shapes alone."""
    bits = class_bits(variant, config)
    floats = sum(4 * math.prod(shape) for shape in shapes.values())
    package = integers = 0
    for name, width in plan_bits(shapes, {name: family.classify(name) for name in shapes}, bits).items():
        shape = shapes[name]
        size = 4 * math.prod(shape)
        if width < 32:
            size = sum(spec.num_bytes for spec in _integer_specs(name, shape, width, config.block_size))
            integers += size
        package += size
    if family.head not in shapes:  # a tied head is written a second time, as a matrix to multiply with
        width = bits["embedding"]
        shape = shapes[family.embedding]
        package += 4 * math.prod(shape) if width == 32 else sum(s.num_bytes for s in _integer_specs("", shape, width, config.block_size))
    return package, floats + integers


def _integer_specs(name: str, shape: tuple[int, ...], bits: int, block_size: int) -> tuple[TensorSpec, TensorSpec]:
    rows, width = math.prod(shape[:-1]), shape[-1]  # stacked experts lie one below the other
    blocks = num_blocks(width, block_size)
    return (
        TensorSpec(f"{name}.codes", torch.uint8, (rows, blocks, block_size * bits // 8)),
        TensorSpec(f"{name}.scales", torch.float32, (rows, blocks)),
    )


def _integer_tensors(checkpoint: Checkpoint, plan: dict[str, int], block_size: int, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, bits) in enumerate(plan.items(), 1):
        if bits < 32:
            quantized = quantize(checkpoint.read(name).to(torch.float32).flatten(0, -2), bits, block_size)
            yield f"{name}.codes", quantized.codes
            yield f"{name}.scales", quantized.scales
        progress("quantizing", number, len(plan))


def _twin_tensors(
    checkpoint: Checkpoint, integers: Mapping[str, TensorEntry], plan: dict[str, int], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, bits) in enumerate(plan.items(), 1):
        if bits < 32:
            shape = checkpoint.entries[name].shape
            yield name, dequantize(_read_quantized(name, integers), shape[-1], bits).reshape(shape)
        else:
            yield name, checkpoint.read(name).to(torch.float32)
        progress("writing the twin", number, len(plan))


def _read_quantized(name: str, integers: Mapping[str, TensorEntry]) -> Quantized:
    return Quantized(read_tensor(integers[f"{name}.codes"]), read_tensor(integers[f"{name}.scales"]))


def _stored_bytes(names: list[str], checkpoint: Checkpoint, plan: dict[str, int], block_size: int) -> int:
    total = 0
    for name in names:
        if plan[name] < 32:
            total += sum(spec.num_bytes for spec in _integer_specs(name, checkpoint.entries[name].shape, plan[name], block_size))
        else:
            total += checkpoint.entries[name].num_elements * 4
    return total


@dataclass(frozen=True)
class FloatWeight:
    """A matrix [rows, width] in the twin, as it is: all or some rows of a tensor, whose dimensions but the last count as one."""

    entry: TensorEntry
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        start, stop = self.rows or (0, math.prod(self.entry.shape[:-1]))
        return stop - start, self.entry.shape[-1]

    def read(self) -> torch.Tensor:
        """The matrix, float32 [rows, width]."""
        flat = replace(self.entry, shape=(math.prod(self.entry.shape[:-1]), self.entry.shape[-1]))
        return read_rows(flat, *(self.rows or (0, flat.shape[0]))).to(torch.float32)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix [rows, width] in the twin: where its integers are, and the first of its rows there."""

    name: str
    integers: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    bits: int
    block_size: int
    start: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks along the width."""
        return num_blocks(self.shape[1], self.block_size)

    def read(self) -> Quantized:
        """Codes and scales; see `Quantized`."""
        rows = (self.start, self.start + self.shape[0])
        codes, scales = (read_rows(self.integers[f"{self.name}.{part}"], *rows) for part in ("codes", "scales"))
        return Quantized(codes, scales)


Weight = FloatWeight | QuantizedWeight


class Twin:
    """A directory that `quantize_checkpoint` wrote, opened for the graph builder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = open_checkpoint(directory)
        self.scheme = json.loads((directory / SCHEME_NAME).read_text(encoding="utf-8"))
        self.integers = index_tensors(directory, _STEM) if self.scheme["tensors"] else {}

    @cached_property
    def family(self) -> DecoderFamily:
        """What the graph builder knows of the architecture.

        Raises:
            ExportError: it does not know it.
        """
        return find_decoder_family(self.checkpoint.config)

    def weight(self, name: str, rows: tuple[int, int] | None = None) -> Weight:
        """The matrix `name`, quantized or not, or some of its rows; all dimensions but the last count as rows."""
        shape = self.checkpoint.entries[name].shape
        bits = self.scheme["tensors"].get(name)
        if bits is None:
            return FloatWeight(self.checkpoint.entries[name], rows)
        start, stop = rows or (0, math.prod(shape[:-1]))
        return QuantizedWeight(name, self.integers, (stop - start, shape[-1]), bits, self.scheme["block_size"], start)
