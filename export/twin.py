"""The quantized checkpoint: integers and scales, and the torch model that computes with the same values.

The output directory is a plain Hugging Face checkpoint in float32 whose weights are the dequantized ones, so transformers alone can run exactly
what the ONNX file will hold: the *twin*. Where the graph computes in float16, weights and scales are rounded to it here, once. Beside
it `quantized.safetensors` keeps the integers and scales that the graph packs.
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

from export.config import Device, ElementType, QuantizeConfig, Variant, element_type
from export.errors import ExportError
from export.family import DecoderFamily, TensorClass, find_decoder_family, find_refusal
from export.methods import CalibrationRecord, order_tensors, quantize_tensors
from export.parameters import classify_tensors
from export.progress import Progress
from export.quantization import Quantized, dequantize, is_quantized, num_blocks
from upcycle.checkpoint import Checkpoint, TensorEntry, copy_companions, index_tensors, open_checkpoint, read_rows, read_tensor
from upcycle.shards import TensorSpec, write_tensors

SCHEME_NAME = "quantization.json"
_STEM = "quantized"
_SHARD_BYTES = 5_000_000_000
_FLOAT_BITS: dict[ElementType, int] = {"float32": 32, "float16": 16}
_TORCH_TYPES: dict[ElementType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class QuantizeFacts:
    """What was quantized: bits of each tensor class, bytes of the experts and the share of them that is quantized.

    Of calibration: tokens of the expert that saw the fewest, None without calibration, and matrices that saw too few for GPTQ; by layer, tokens of
    its experts, and its routing before and after correction, in words. Groups of matrices whose inputs are scaled, those that are best unscaled, and
    those that have nothing to fold scales into.
    """

    bits: dict[TensorClass, int]
    block_size: int
    expert_bytes: int
    quantized_expert_share: float
    quantized_bytes: int
    num_quantized_tensors: int
    method: str
    fewest_expert_tokens: int | None
    num_matrices_with_few_tokens: int
    tokens_by_layer: dict[int, str]
    routing_by_layer: dict[int, str]
    num_scaled_groups: int
    num_groups_best_unscaled: int
    num_groups_without_place: int


def class_bits(variant: Variant, config: QuantizeConfig, device: Device = "cpu") -> dict[TensorClass, int]:
    """Bits of each tensor class; 32 is float32, 16 rounded to float16, and what is below is quantized. Routers and norms always are 32."""
    floats = _FLOAT_BITS[element_type(variant, device)]
    if variant in ("float32", "float16"):
        return {"experts": floats, "attention": floats, "embedding": floats, "head": floats, "router": 32, "norm": 32, "bias": floats}
    own = 8 if variant == "int8" else 4

    def choose(setting: str | int) -> int:
        return own if setting == "variant" else floats if setting == 16 else max(own, int(setting))

    attention, embedding = choose(config.attention_bits), choose(config.embedding_bits)
    head = embedding if config.head_bits == "embedding" else choose(config.head_bits)
    return {"experts": own, "attention": attention, "embedding": embedding, "head": head, "router": 32, "norm": 32, "bias": floats}


def check_head(config: QuantizeConfig, tied: bool) -> None:
    """Refuse bits of its own for a head that is the embedding.

    Raises:
        ExportError: the recipe asks for them.
    """
    if tied and config.head_bits != "embedding":
        raise ExportError(f"quantize.head_bits is {config.head_bits!r}, and this model's head is its embedding; leave it out; set embedding_bits")


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
    """Bits of every tensor by name, as `class_bits` has them. A tensor without elements (a shared expert of width 0) has nothing to quantize."""
    return {name: bits[classes[name]] if math.prod(shape) else 32 for name, shape in shapes.items()}


def quantize_checkpoint(
    source: Path, output: Path, variant: Variant, config: QuantizeConfig, progress: Progress, device: Device = "cpu",
    blocks: torch.Tensor | None = None,
) -> QuantizeFacts:  # fmt: skip
    """Write the twin of the mixture-of-experts checkpoint in `source`, and its integers, into `output`; one tensor in memory at a time, or one layer.

    `blocks` are token ids [N, S] to calibrate on, which method gptq needs; of them `calibration_tokens` are read, blocks taken evenly.

    Raises:
        ExportError: the architecture is not covered, an expert would stay unquantized, or a weight is beyond float16's range where that is needed.
    """
    checkpoint = open_checkpoint(source)
    family = find_decoder_family(checkpoint.config) if find_refusal(checkpoint.config) is None else None
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    check_head(config, checkpoint.config.tie_word_embeddings)
    computes_in = element_type(variant, device)
    classes, bits = plan_classes(checkpoint.config, shapes), class_bits(variant, config, device)
    plan = plan_bits(shapes, classes, bits)
    checkpoint.config.dtype = torch.float32
    checkpoint.config.save_pretrained(output)
    copy_companions(source, output)
    integer_specs = [
        spec for name in order_tensors(plan, family) if is_quantized(plan[name])
        for spec in _integer_specs(name, checkpoint.entries[name].shape, plan[name], config.block_size)
    ]  # fmt: skip
    record = CalibrationRecord()
    if integer_specs:
        text = None if blocks is None else _choose_evenly(blocks, config.calibration_tokens)
        quantized = quantize_tensors(checkpoint, family, plan, config, _TORCH_TYPES[computes_in], text, record, progress)
        write_tensors(output, integer_specs, _integer_tensors(checkpoint, quantized), _SHARD_BYTES, stem=_STEM)
    integers = index_tensors(output, _STEM) if integer_specs else {}
    specs = [TensorSpec(name, torch.float32, entry.shape) for name, entry in checkpoint.entries.items()]
    write_tensors(output, specs, _twin_tensors(checkpoint, integers, plan, record.replaced, progress), _SHARD_BYTES)
    experts = [name for name in plan if classes[name] == "experts" and checkpoint.entries[name].num_elements]
    sizes = {name: checkpoint.entries[name].num_elements for name in experts}
    share = sum(sizes[name] for name in experts if is_quantized(plan[name])) / max(1, sum(sizes.values()))
    if is_quantized(bits["experts"]) and share < 1:
        raise ExportError(f"{source}: only {share:.1%} of the expert weights could be quantized; all of them must be")
    facts = QuantizeFacts(
        bits=bits,
        block_size=config.block_size,
        expert_bytes=_stored_bytes(experts, checkpoint, plan, config.block_size),
        quantized_expert_share=share,
        quantized_bytes=sum(spec.num_bytes for spec in integer_specs),
        num_quantized_tensors=len(integer_specs) // 2,
        method="search" if config.method == "gptq" and family is None else config.method,
        fewest_expert_tokens=min((count for counts in record.expert_tokens.values() for count in counts), default=None),
        num_matrices_with_few_tokens=record.num_searched,
        tokens_by_layer=record.describe_tokens(),
        routing_by_layer={layer: found.describe() for layer, found in record.routers.items()},
        num_scaled_groups=record.scaling.num_scaled,
        num_groups_best_unscaled=record.scaling.num_best_unscaled,
        num_groups_without_place=record.scaling.num_without_place,
    )
    integer_widths = {name: width for name, width in plan.items() if is_quantized(width)}
    scheme = {
        "variant": variant, "element_type": computes_in, "tensors": integer_widths, "expert_tokens": record.expert_tokens,
        "routers": {layer: asdict(found) for layer, found in record.routers.items()}, **asdict(facts),
    }  # fmt: skip
    (output / SCHEME_NAME).write_text(json.dumps(scheme, indent=2) + "\n", encoding="utf-8")
    return facts


def estimate_bytes(
    shapes: Mapping[str, tuple[int, ...]], family: DecoderFamily, variant: Variant, config: QuantizeConfig, device: Device = "cpu"
) -> tuple[int, int]:
    """Weight bytes of a variant's ONNX package and of its quantize artifact (twin and integers), from names and shapes alone."""
    bits = class_bits(variant, config, device)
    scale_bytes = _FLOAT_BITS[element_type(variant, device)] // 8
    floats = sum(4 * math.prod(shape) for shape in shapes.values())
    package = integers = 0

    def packed(shape: tuple[int, ...], width: int, bytes_of_scales: int) -> int:
        if not is_quantized(width):
            return width // 8 * math.prod(shape)
        codes, scales = _integer_specs("", shape, width, config.block_size)
        return codes.num_bytes + math.prod(scales.shape) * bytes_of_scales

    for name, width in plan_bits(shapes, {name: family.classify(name) for name in shapes}, bits).items():
        if is_quantized(width):
            integers += sum(spec.num_bytes for spec in _integer_specs(name, shapes[name], width, config.block_size))
        package += packed(shapes[name], width, 4 if name == family.embedding else scale_bytes)  # the embedding's scales stay in float32
    if family.head not in shapes:  # a tied head is written a second time, as a matrix to multiply with
        package += packed(shapes[family.embedding], bits["embedding"], scale_bytes)
    return package, floats + integers


def _integer_specs(name: str, shape: tuple[int, ...], bits: int, block_size: int) -> tuple[TensorSpec, TensorSpec]:
    rows, width = math.prod(shape[:-1]), shape[-1]  # stacked experts lie one below the other
    blocks = num_blocks(width, block_size)
    return (
        TensorSpec(f"{name}.codes", torch.uint8, (rows, blocks, block_size * bits // 8)),
        TensorSpec(f"{name}.scales", torch.float32, (rows, blocks)),
    )


def _choose_evenly(blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Blocks of `num_tokens` in all at most, and one at least, spread over all of them."""
    count = max(1, min(len(blocks), num_tokens // blocks.shape[1]))
    return blocks[torch.arange(count) * len(blocks) // count]


def _integer_tensors(checkpoint: Checkpoint, quantized: Iterator[tuple[str, Quantized]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, found in quantized:
        if not torch.isfinite(found.scales).all():
            raise _beyond_float16(checkpoint, name, checkpoint.read(name).to(torch.float32))
        yield f"{name}.codes", found.codes
        yield f"{name}.scales", found.scales


def _twin_tensors(
    checkpoint: Checkpoint, integers: Mapping[str, TensorEntry], plan: dict[str, int], replaced: Mapping[str, torch.Tensor], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, bits) in enumerate(plan.items(), 1):
        if is_quantized(bits):
            shape = checkpoint.entries[name].shape
            yield name, dequantize(_read_quantized(name, integers), shape[-1], bits).reshape(shape)
        else:
            weight = (replaced[name] if name in replaced else checkpoint.read(name)).to(torch.float32)
            rounded = weight.to(torch.float16).to(torch.float32) if bits == 16 else weight
            if not torch.isfinite(rounded).all():
                raise _beyond_float16(checkpoint, name, weight)
            yield name, rounded
        progress("writing the twin", number, len(plan))


def _beyond_float16(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> ExportError:
    return ExportError(
        f"{checkpoint.directory}: tensor '{name}' holds {float(weight.abs().max()):.6g}; float16 reaches {torch.finfo(torch.float16).max:.0f}; "
        "leave out the variants in float16, which are 'float16' and with export.device 'cuda' all but 'float32'"
    )


def _read_quantized(name: str, integers: Mapping[str, TensorEntry]) -> Quantized:
    return Quantized(read_tensor(integers[f"{name}.codes"]), read_tensor(integers[f"{name}.scales"]))


def _stored_bytes(names: list[str], checkpoint: Checkpoint, plan: dict[str, int], block_size: int) -> int:
    total = 0
    for name in names:
        if is_quantized(plan[name]):
            total += sum(spec.num_bytes for spec in _integer_specs(name, checkpoint.entries[name].shape, plan[name], block_size))
        else:
            total += checkpoint.entries[name].num_elements * plan[name] // 8
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
        self.element_type: ElementType = self.scheme["element_type"]
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
