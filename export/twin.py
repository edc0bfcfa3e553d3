"""The quantized checkpoint: integers and scales, and the torch model that computes with the same values.

The output directory is a plain Hugging Face checkpoint in float32 whose weights are the dequantized ones, so transformers alone can run exactly
what the ONNX file will hold: the *twin*. Where the file holds float16 or bfloat16, weights and scales are rounded to it here, once. Beside
it `quantized.safetensors` keeps the integers and scales that the graph packs.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from export.bit_search import BitChoices, BitSearch, BitSearcher, find_units, measure_units, options_of
from export.config import QUANTIZED, STATIC, BitsOverride, Device, ElementType, QuantizeConfig, Variant, element_type, float_type
from export.errors import ExportError
from export.family import DecoderFamily, TensorClass, find_decoder_family, find_refusal, layer_of, rotary_switch
from export.journal import LayerJournal, LineJournal
from export.methods import CalibrationRecord, order_tensors, quantize_tensors
from export.parameters import classify_tensors
from export.progress import Progress
from export.quantization import Quantized, dequantize, is_quantized, num_blocks, zero_point_bytes
from export.sensitivity import Ruler, Weights
from export.static import quantize_static
from upcycle.checkpoint import Checkpoint, TensorEntry, check_values, copy_companions, index_tensors, open_checkpoint, read_rows, read_tensor
from upcycle.shards import TensorSpec, write_tensors

SCHEME_NAME = "quantization.json"
_STEM = "quantized"
_PARTS = ("codes", "scales", "zero_points")
_SHARD_BYTES = 5_000_000_000
_LAYER_NODES, _EXPERT_NODES = 1 << 14, 1 << 12
"""Bytes of a layer's nodes in a graph, and of those of one expert: what the largest lowering was seen to take, and some more."""
_FLOAT_BITS: dict[ElementType, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
_TORCH_TYPES: dict[ElementType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class QuantizeFacts:
    """What was quantized: bits of each tensor class, bytes of the experts and the share of them that is quantized.

    `block_size` is None where each row has one scale.

    Bits are the mean of a class where its tensors differ. Of calibration: tokens of the expert that saw the fewest, None without calibration, and
    matrices that saw too few for GPTQ; by layer, tokens of its experts, and its routing before and after correction, in words; groups of matrices
    whose inputs are scaled, those that are best unscaled, and those that have nothing to fold scales into. `search` is how the bits of variant
    'mixed' were found.
    """

    bits: dict[TensorClass, float]
    block_size: int | None
    zero_points: bool
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
    search: BitSearch | None = None


def class_bits(variant: Variant, config: QuantizeConfig, device: Device = "cpu") -> dict[TensorClass, int]:
    """Bits of each tensor class; 32 is float32, 16 rounded to `float_type`, and what is below is quantized. Routers and norms always are 32.

    Of variant 'mixed' these are the fewest that a class may have.
    """
    floats = _FLOAT_BITS[float_type(variant, device)]
    if variant not in QUANTIZED:
        return {"experts": floats, "attention": floats, "embedding": floats, "head": floats, "router": 32, "norm": 32, "bias": floats}
    if variant == "mixed":
        return {"experts": 4, "attention": 4, "embedding": 4, "head": 4, "router": 32, "norm": 32, "bias": floats}
    own = 4 if variant == "int4" else 8

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


def check_overrides(config: QuantizeConfig, model: PreTrainedConfig) -> None:
    """Refuse overrides of layers that the model does not have.

    Raises:
        ExportError: there is one.
    """
    last = int(model.num_hidden_layers) - 1
    for number, override in enumerate(config.overrides):
        if max(override.layers) > last:
            raise ExportError(f"quantize.overrides[{number}].layers has {max(override.layers)}; the model's layers are 0 to {last}; correct it")


def plan_classes(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorClass]:
    """The class of every tensor: by the family's names where there is a builder, by the model's modules where it has to be traced.

    Raises:
        ExportError: neither knows a tensor.
    """
    if find_refusal(config) is not None:
        return classify_tensors(config, shapes)
    family = find_decoder_family(config)
    return {name: family.classify(name) for name in shapes}


def plan_bits(
    shapes: Mapping[str, tuple[int, ...]], classes: Mapping[str, TensorClass], bits: Mapping[TensorClass, int], overrides: Sequence[BitsOverride] = ()
) -> dict[str, int]:
    """Bits of every tensor by name, as `class_bits` has them, or more where an override says so; 16 there are `bits["bias"]`, which are floats.

    A tensor without elements (a shared expert of width 0) has nothing to quantize.
    """
    raised: dict[tuple[int, TensorClass], int] = {(layer, override.tensors): override.bits for override in overrides for layer in override.layers}

    def choose(name: str) -> int:
        own, least = bits[classes[name]], raised.get((layer_of(name), classes[name]), 0)
        return max(own, bits["bias"] if least == 16 else least) if is_quantized(own) else own

    return {name: choose(name) if math.prod(shape) else 32 for name, shape in shapes.items()}


def quantize_checkpoint(
    source: Path, output: Path, variant: Variant, config: QuantizeConfig, progress: Progress, device: Device = "cpu",
    blocks: torch.Tensor | None = None, held_out: torch.Tensor | None = None, scratch: Path | None = None,
) -> QuantizeFacts:  # fmt: skip
    """Write the twin of the mixture-of-experts checkpoint in `source`, and its integers, into `output`; one tensor in memory at a time, or one layer.

    `blocks` are token ids [N, S] to calibrate on, which method gptq needs; of them `calibration_tokens` are read, blocks taken evenly. `held_out`
    are ids [N, S] that the bits of variant 'mixed' are chosen on, `search_tokens` of them. A killed call is taken up again where it was if it is
    made again with the same arguments and the same `scratch`; without that nothing is kept.

    Raises:
        ExportError: the architecture is not covered, an expert would stay unquantized, a weight is beyond float16's range where that is needed, or no
            bits keep to the limits of variant 'mixed'.
        UpcycleError: a tensor holds NaN or infinite values; nothing is written then.
    """
    if variant == STATIC and device == "cuda":
        raise ExportError(f"variant '{STATIC}' is for providers that compute in 8 bits, and CUDA's computes its products as floats; leave it out")
    checkpoint = open_checkpoint(source)
    family = find_decoder_family(checkpoint.config) if find_refusal(checkpoint.config) is None else None
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    check_head(config, checkpoint.config.tie_word_embeddings)
    classes = plan_classes(checkpoint.config, shapes)
    check_overrides(config, checkpoint.config)
    job = _Job(checkpoint, family, classes, variant, config, device, blocks, output, progress, scratch)
    bits = class_bits(variant, config, device)
    plan = plan_bits(shapes, classes, bits, config.overrides)
    search = None
    for number, _ in enumerate(check_values(checkpoint), 1):
        progress("checking weights", number, len(checkpoint.entries))
    checkpoint.config.dtype = torch.float32
    checkpoint.config.save_pretrained(output)
    copy_companions(source, output)
    if variant == "mixed":
        plan, record, search = _search_bits(job, plan, held_out)
    else:
        record = _write_twin(job, plan)
    integer_specs = job.integer_specs(plan)
    experts = [name for name in plan if classes[name] == "experts" and checkpoint.entries[name].num_elements]
    sizes = {name: checkpoint.entries[name].num_elements for name in experts}
    share = sum(sizes[name] for name in experts if is_quantized(plan[name])) / max(1, sum(sizes.values()))
    if is_quantized(bits["experts"]) and share < 1 and not any(o.tensors == "experts" and o.bits == 16 for o in config.overrides):
        raise ExportError(f"{source}: only {share:.1%} of the expert weights could be quantized; all of them must be")
    facts = QuantizeFacts(
        bits=_mean_bits(bits, plan, classes, shapes),
        block_size=job.packing.block_size,
        zero_points=job.packing.zero_points,
        expert_bytes=_stored_bytes(experts, checkpoint, plan, job.packing),
        quantized_expert_share=share,
        quantized_bytes=sum(spec.num_bytes for spec in integer_specs),
        num_quantized_tensors=sum(map(is_quantized, plan.values())),
        method="round" if variant == STATIC else "search" if config.method == "gptq" and family is None else config.method,
        fewest_expert_tokens=min((count for counts in record.expert_tokens.values() for count in counts), default=None),
        num_matrices_with_few_tokens=record.num_searched,
        tokens_by_layer=record.describe_tokens(),
        routing_by_layer={layer: found.describe() for layer, found in record.routers.items()},
        num_scaled_groups=record.scaling.num_scaled,
        num_groups_best_unscaled=record.scaling.num_best_unscaled,
        num_groups_without_place=record.scaling.num_without_place,
        search=search,
    )
    integer_widths = {name: width for name, width in plan.items() if is_quantized(width)}
    scheme = {
        "variant": variant, "element_type": job.computes_in, "float_type": float_type(variant, device), "tensors": integer_widths,
        "expert_tokens": record.expert_tokens, "input_scales": record.input_scales,
        "routers": {layer: asdict(found) for layer, found in record.routers.items()}, **asdict(facts),
    }  # fmt: skip
    (output / SCHEME_NAME).write_text(json.dumps(scheme, indent=2) + "\n", encoding="utf-8")
    return facts


@dataclass(frozen=True)
class _Job:
    """What is quantized, how, and where it goes."""

    checkpoint: Checkpoint
    family: DecoderFamily | None
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
        """What the graph computes in, which scales are rounded to."""
        return element_type(self.variant, self.device)

    @property
    def packing(self) -> Packing:
        """How the integers lie."""
        return Packing.of(self.variant, self.config)

    def integer_specs(self, plan: Mapping[str, int]) -> list[TensorSpec]:
        """The integers of a plan, in the order in which they are made."""
        return [
            spec for name in order_tensors(plan, self.family) if is_quantized(plan[name])
            for spec in _integer_specs(name, self.checkpoint.entries[name].shape, plan[name], self.packing)
        ]  # fmt: skip


def _write_integers(job: _Job, plan: Mapping[str, int], output: Path) -> tuple[dict[str, TensorEntry], CalibrationRecord]:
    """Quantize by a plan, and write the integers into `output`, in the place of those that are there; returns where they are."""
    for old in output.glob(f"{_STEM}*.safetensors*"):
        old.unlink()
    record, specs = CalibrationRecord(), job.integer_specs(plan)
    if not specs:
        return {}, record
    text = None if job.blocks is None else _choose_evenly(job.blocks, job.config.calibration_tokens)
    if job.variant == STATIC:
        quantized = quantize_static(job.checkpoint, job.family, plan, job.config, text, record, job.progress)
    else:
        quantized = quantize_tensors(
            job.checkpoint, job.family, plan, job.config, _TORCH_TYPES[job.computes_in], text, record, job.progress,
            LayerJournal(job.scratch, plan, job.config.model_dump_json()),
        )  # fmt: skip
    write_tensors(output, specs, _integer_tensors(job.checkpoint, quantized), _SHARD_BYTES, stem=_STEM)
    return index_tensors(output, _STEM), record


def _write_twin(job: _Job, plan: dict[str, int]) -> CalibrationRecord:
    """Write the integers of a plan, and the checkpoint that has their values."""
    integers, record = _write_integers(job, plan, job.output)
    specs = [TensorSpec(name, torch.float32, entry.shape) for name, entry in job.checkpoint.entries.items()]
    write_tensors(job.output, specs, _twin_tensors(job, integers, plan, record.replaced), _SHARD_BYTES)
    return record


def _search_bits(job: _Job, base: Mapping[str, int], held_out: torch.Tensor | None) -> tuple[dict[str, int], CalibrationRecord, BitSearch]:
    """Choose the bits of variant 'mixed', and write the twin; returns the plan, what calibration saw, and the search.

    Every part is quantized in 4 and in 8 bits, and these candidates are measured, each by itself and so without scaled inputs and corrected routers,
    which bind parts together. The twin is quantized anew by the chosen plan, each layer behind
    the others as they are in it, and measured too: it is what must keep to the limit.
    """
    config, family = job.config, job.family
    alone = replace(job, config=config.model_copy(update={"input_scaling": "none", "correct_routers": False}))
    if held_out is None or family is None:
        lacks = "text to choose on; give held-out blocks" if family is not None else "a family of decoders that can be walked; use 'int8' or 'int4'"
        raise ExportError(f"{job.checkpoint.directory}: variant 'mixed' lacks {lacks}")
    shapes = {name: entry.shape for name, entry in job.checkpoint.entries.items()}
    floats = _FLOAT_BITS[job.computes_in]
    units = find_units(job.classes, shapes)

    def count_bytes(plan: Mapping[str, int]) -> int:
        return package_bytes({name: shapes[name] for name in plan}, family, plan, job.packing, floats // 8)

    graph_bytes = rotary_bytes(job.checkpoint.config, floats // 8) + node_bytes(job.checkpoint.config, family)
    check_budget(config, count_bytes(base) + graph_bytes)

    with tempfile.TemporaryDirectory(dir=job.output) as temporary:
        folder = job.scratch or Path(temporary)
        candidates: dict[int, dict[str, TensorEntry]] = {}
        for bits in (4, 8):
            (folder / f"{bits}-bits").mkdir(parents=True, exist_ok=True)
            plan = {name: bits if any(name in names for names in units.values()) else width for name, width in base.items()}
            candidates[bits], _ = _write_integers(alone, plan, folder / f"{bits}-bits")

        def read(name: str, bits: int) -> torch.Tensor:
            return dequantize(_read_quantized(name, candidates[bits]), shapes[name][-1], bits).reshape(shapes[name])

        ruler = Ruler(job.checkpoint, _choose_evenly(held_out, config.search_tokens))
        options = {unit: options_of(unit, config, floats) for unit in units}
        journal = LineJournal(folder / "sensitivities.jsonl")
        sensitivities = measure_units(ruler, units, options, floats, count_bytes, read, job.progress, journal)
        searcher = BitSearcher(
            ruler, BitChoices(base, units, sensitivities), sensitivities, config, lambda plan: count_bytes(plan) + graph_bytes, read, job.progress
        )
        searcher.choose()
        while True:
            record = _write_twin(job, searcher.plan)
            cost = ruler.measure(_Tensors(open_checkpoint(job.output)))
            if not searcher.reject(cost):
                break
        return searcher.plan, record, searcher.result(cost)


class _Tensors(Weights):
    """The tensors of a checkpoint, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.entries)

    def __len__(self) -> int:
        return len(self._checkpoint.entries)


def _mean_bits(
    bits: Mapping[TensorClass, int], plan: Mapping[str, int], classes: Mapping[str, TensorClass], shapes: Mapping[str, tuple[int, ...]]
) -> dict[TensorClass, float]:
    """Bits of each class, the mean over its weights where they differ; a class without tensors has those that it would have."""
    found: dict[TensorClass, float] = dict(bits)
    for kind in found:
        sizes = {name: math.prod(shapes[name]) for name in plan if classes[name] == kind and math.prod(shapes[name]) > 0}
        if sizes:
            mean = sum(size * plan[name] for name, size in sizes.items()) / sum(sizes.values())
            found[kind] = int(mean) if mean == int(mean) else round(mean, 3)
    return found


def estimate_bytes(
    model: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], variant: Variant, config: QuantizeConfig, device: Device = "cpu"
) -> tuple[int, int]:
    """Bytes of a variant's ONNX package and of the weights in its quantize artifact (twin and integers), from names and shapes alone.

    Variant 'mixed' has its budget, or, where its limit is one of perplexity, as many bytes as 8 bits everywhere; while it is made both candidates of
    all weights lie beside it.

    Raises:
        ExportError: the budget of variant 'mixed' is too small for any bits, or overrides name layers that there are not.
    """
    check_overrides(config, model)
    family = find_decoder_family(model)
    bits, floats, packing = class_bits(variant, config, device), _FLOAT_BITS[element_type(variant, device)], Packing.of(variant, config)
    classes = {name: family.classify(name) for name in shapes}
    plan = plan_bits(shapes, classes, bits, config.overrides)

    def integer_bytes(plan: Mapping[str, int]) -> int:
        integers = [(shapes[name], width) for name, width in plan.items() if is_quantized(width)]
        return sum(spec.num_bytes for shape, width in integers for spec in _integer_specs("", shape, width, packing))

    tables = rotary_bytes(model, floats // 8)
    package, artifact = package_bytes(shapes, family, plan, packing, floats // 8) + tables, integer_bytes(plan)
    if variant == "mixed":
        check_budget(config, package + node_bytes(model, family))
        wide = {name: 8 if is_quantized(width) else width for name, width in plan.items()}
        package = config.budget or package_bytes(shapes, family, wide, packing, floats // 8) + tables
        artifact += 2 * integer_bytes(wide)
    return package, artifact + sum(4 * math.prod(shape) for shape in shapes.values())


def check_budget(config: QuantizeConfig, fewest_bytes: int) -> None:
    """Refuse a budget that the fewest bits do not fit into.

    Raises:
        ExportError: it is too small.
    """
    if config.budget is not None and fewest_bytes > config.budget:
        raise ExportError(f"quantize.budget is {config.budget:,} bytes; the fewest bits everywhere take {fewest_bytes:,}; raise it to more than that")


def rotary_bytes(model: PreTrainedConfig, float_bytes: int) -> int:
    """Bytes of a package's rotary tables: cosines and sines of half a head for each position."""
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int((model.max_position_embeddings + (rotary_switch(model) or 0)) * head_dim * float_bytes)


def node_bytes(model: PreTrainedConfig, family: DecoderFamily) -> int:
    """Bytes that a package's nodes take at most."""
    experts = family.routing(model).num_experts if family.routing is not None else 0
    return int(model.num_hidden_layers) * (_LAYER_NODES + experts * _EXPERT_NODES)


def package_bytes(shapes: Mapping[str, tuple[int, ...]], family: DecoderFamily, plan: Mapping[str, int], packing: Packing, scale_bytes: int) -> int:
    """Bytes in an ONNX package of the tensors in `shapes`, with the bits of `plan`; a scale has `scale_bytes`, one of the embedding 4."""

    def packed(shape: tuple[int, ...], width: int, bytes_of_scales: int) -> int:
        if not is_quantized(width):
            return width // 8 * math.prod(shape)
        codes, scales, *zero_points = _integer_specs("", shape, width, packing)
        return codes.num_bytes + math.prod(scales.shape) * bytes_of_scales + sum(spec.num_bytes for spec in zero_points)

    total = sum(packed(shape, plan[name], 4 if name == family.embedding else scale_bytes) for name, shape in shapes.items())
    if family.embedding in shapes and family.head not in shapes:  # a tied head is written a second time, as a matrix to multiply with
        total += packed(shapes[family.embedding], plan[family.embedding], scale_bytes)
    return total


@dataclass(frozen=True)
class Packing:
    """How integers lie: weights that share a scale, None being those of a row, and whether blocks have zero points of their own."""

    block_size: int | None
    zero_points: bool

    @classmethod
    def of(cls, variant: Variant, config: QuantizeConfig) -> Packing:
        """That of a variant."""
        return cls(None, zero_points=False) if variant == STATIC else cls(config.block_size, config.zero_points)


def _integer_specs(name: str, shape: tuple[int, ...], bits: int, packing: Packing) -> list[TensorSpec]:
    rows, width = math.prod(shape[:-1]), shape[-1]  # stacked experts lie one below the other
    block_size = packing.block_size or width
    blocks = num_blocks(width, block_size)
    specs = [
        TensorSpec(f"{name}.codes", torch.uint8, (rows, blocks, block_size * bits // 8)),
        TensorSpec(f"{name}.scales", torch.float32, (rows, blocks)),
    ]
    if packing.zero_points:
        specs.append(TensorSpec(f"{name}.zero_points", torch.uint8, (rows, zero_point_bytes(width, bits, block_size))))
    return specs


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
        if found.zero_points is not None:
            yield f"{name}.zero_points", found.zero_points


def _twin_tensors(
    job: _Job, integers: Mapping[str, TensorEntry], plan: dict[str, int], replaced: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint, narrow = job.checkpoint, _TORCH_TYPES[float_type(job.variant, job.device)]
    for number, (name, bits) in enumerate(plan.items(), 1):
        if is_quantized(bits):
            shape = checkpoint.entries[name].shape
            yield name, dequantize(_read_quantized(name, integers), shape[-1], bits).reshape(shape)
        else:
            weight = (replaced[name] if name in replaced else checkpoint.read(name)).to(torch.float32)
            rounded = weight.to(narrow).to(torch.float32) if bits == 16 else weight
            if not torch.isfinite(rounded).all():
                raise _beyond_float16(checkpoint, name, weight) if narrow == torch.float16 else _beyond_bfloat16(checkpoint, name, weight)
            yield name, rounded
        job.progress("writing the twin", number, len(plan))


def _beyond_float16(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> ExportError:
    return ExportError(
        f"{checkpoint.directory}: tensor '{name}' holds {float(weight.abs().max()):.6g}; float16 reaches {torch.finfo(torch.float16).max:.0f}; "
        "leave out the variants in float16, which are 'float16' and with export.device 'cuda' the quantized ones"
    )


def _beyond_bfloat16(checkpoint: Checkpoint, name: str, weight: torch.Tensor) -> ExportError:
    reach = torch.finfo(torch.bfloat16).max
    return ExportError(
        f"{checkpoint.directory}: tensor '{name}' holds {float(weight.abs().max()):.6g}; bfloat16 reaches {reach:.6g}; leave out 'bfloat16'"
    )


def _read_quantized(name: str, integers: Mapping[str, TensorEntry]) -> Quantized:
    return Quantized(*(read_tensor(integers[key]) for part in _PARTS if (key := f"{name}.{part}") in integers))


def _stored_bytes(names: list[str], checkpoint: Checkpoint, plan: dict[str, int], packing: Packing) -> int:
    total = 0
    for name in names:
        if is_quantized(plan[name]):
            total += sum(spec.num_bytes for spec in _integer_specs(name, checkpoint.entries[name].shape, plan[name], packing))
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
    """A quantized matrix [rows, width] in the twin: where its integers are, and the first of its rows there.

    `is_static`: its rows have one scale each, a block being as wide as they are, and it reads integers times `input_scale`.
    """

    name: str
    integers: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    bits: int
    block_size: int
    start: int = 0
    zero_points: bool = False
    is_static: bool = False
    input_scale: float = 1.0

    @property
    def num_blocks(self) -> int:
        """Blocks along the width."""
        return num_blocks(self.shape[1], self.block_size)

    def read(self) -> Quantized:
        """Codes, scales and zero points; see `Quantized`."""
        rows = (self.start, self.start + self.shape[0])
        return Quantized(*(read_rows(self.integers[f"{self.name}.{part}"], *rows) for part in (_PARTS if self.zero_points else _PARTS[:2])))


Weight = FloatWeight | QuantizedWeight


class Twin:
    """A directory that `quantize_checkpoint` wrote, opened for the graph builder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = open_checkpoint(directory)
        self.scheme = json.loads((directory / SCHEME_NAME).read_text(encoding="utf-8"))
        self.element_type: ElementType = self.scheme["element_type"]
        self.float_type: ElementType = self.scheme["float_type"]
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
        if self.scheme["variant"] != STATIC:
            return QuantizedWeight(name, self.integers, (stop - start, shape[-1]), bits, self.scheme["block_size"], start, self.scheme["zero_points"])
        scales = self.scheme["input_scales"].get(name, [1.0])  # an embedding that is only read row by row multiplies nothing
        rows_of_one = math.prod(shape[:-1]) // len(scales)
        own = scales[start // rows_of_one]
        return QuantizedWeight(name, self.integers, (stop - start, shape[-1]), bits, shape[-1], start, is_static=True, input_scale=own)
