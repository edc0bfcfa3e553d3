"""The quantize stage: from a checkpoint to its twin and its scales.

Where the ONNX file holds float16 or bfloat16, weights and scales are rounded to it here, once. Scales are 16 bits in
every file: integers are chosen for them as they are rounded, so that a step that is off by 0.2 % at most adds 2 % to
the squared error of 8 bits, and less to that of 4.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.coverage import find_decoder_family, find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.bit_search import (
    BitChoices,
    BitSearcher,
    Candidates,
    find_units,
    measure_units,
    options_of,
)
from dense2moe.export.quantization.bits import (
    FLOAT_BITS,
    check_head,
    check_overrides,
    class_bits,
    mean_bits,
    plan_bits,
    plan_classes,
)
from dense2moe.export.quantization.blockwise import dequantize, is_quantized
from dense2moe.export.quantization.calibration_record import CalibrationRecord
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import BitSearch, QuantizeFacts
from dense2moe.export.quantization.journal import RecordJournal
from dense2moe.export.quantization.packing import (
    check_budget,
    find_tied,
    node_bytes,
    package_bytes,
    rotary_bytes,
    stored_bytes,
)
from dense2moe.export.quantization.parameters import find_transposed, has_tied_head
from dense2moe.export.quantization.sensitivity import Ruler, Weights
from dense2moe.export.quantization.twin import SCHEME_NAME, read_quantized
from dense2moe.export.quantization.writer import Quantization, choose_text, write_integers, write_twin
from dense2moe.export.variant import STATIC, Device, Variant, float_type, rounds_to_8_bits
from dense2moe.upcycle.checkpoints.config_files import save_config
from dense2moe.upcycle.checkpoints.reader import Checkpoint, check_values, copy_companions, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.durable import begin
from dense2moe.upcycle.numbers import name_specials
from dense2moe.upcycle.progress import Progress


@dataclass(frozen=True)
class QuantizeInputs:
    """Inputs of quantizing besides a checkpoint and its settings.

    `device` is what the graph will run on, `activation_bits` those that it will read the inputs of quantized products
    with on the CPU. `blocks` are token ids [N, S] to calibrate on, which method gptq needs; of them
    `calibration_tokens` are read, blocks taken evenly. `held_out` are ids [N, S] that the bits of variant 'mixed' are
    chosen on, `search_tokens` of them. `scratch` is a folder that a killed call is resumed from, which the caller hands
    to `durable.discard_damage` before; without it nothing is kept.
    """

    device: Device = "cpu"
    activation_bits: int = 8
    blocks: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    scratch: Path | None = None


_NOTHING = QuantizeInputs()


def quantize_checkpoint(
    source: Path,
    output: Path,
    variant: Variant,
    config: QuantizeConfig,
    progress: Progress,
    given: QuantizeInputs = _NOTHING,
) -> QuantizeFacts:
    """Write the checkpoint's twin and its integers into `output`.

    The checkpoint, a mixture of experts, is in `source`. One tensor in memory at a time, or one layer. A killed call is
    resumed if it is made again with the same arguments.

    Raises:
        ExportError: the architecture is not covered, an expert would stay unquantized, a weight is beyond float16's
            range where that is needed, or no bits keep to the limits of variant 'mixed'.
        UpcycleError: a tensor holds NaN or infinite values; nothing is written then.
    """
    device, blocks = given.device, given.blocks
    if variant == STATIC and device == "cuda":
        raise ExportError(
            f"variant '{STATIC}' is for providers that compute in 8 bits, and CUDA's computes its products as "
            "floats; leave it out"
        )
    checkpoint = open_checkpoint(source)
    family = find_decoder_family(checkpoint.config) if find_refusal(checkpoint.config) is None else None
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    check_head(config, has_tied_head(checkpoint.config))
    classes = plan_classes(checkpoint.config, shapes)
    if config.input_scaling == "auto":
        smooth = family is not None and blocks is not None and rounds_to_8_bits(variant, device, given.activation_bits)
        config = config.model_copy(update={"input_scaling": "smooth" if smooth else "none"})
    if config.method == "auto" and (family is None or blocks is None):
        config = config.model_copy(update={"method": "search"})
    check_overrides(config, checkpoint.config)
    job = Quantization(checkpoint, family, classes, variant, config, device, blocks, output, progress, given.scratch)
    bits = class_bits(variant, config, device)
    plan = plan_bits(shapes, classes, bits, config.overrides)
    plan |= dict.fromkeys(find_transposed(checkpoint.config), bits["bias"])
    search = None
    for number, _ in enumerate(check_values(checkpoint), 1):
        progress("checking weights", number, len(checkpoint.entries))
    checkpoint.config.dtype = torch.float32
    save_config(checkpoint.config, output)
    copy_companions(source, output)
    if variant == "mixed":
        plan, record, search = _search_bits(job, plan, given.held_out)
    else:
        record = write_twin(job, plan)
    integer_specs = job.integer_specs(plan)
    experts = [name for name in plan if classes[name] == "experts" and checkpoint.entries[name].num_elements]
    sizes = {name: checkpoint.entries[name].num_elements for name in experts}
    share = sum(sizes[name] for name in experts if is_quantized(plan[name])) / max(1, sum(sizes.values()))
    if (
        is_quantized(bits["experts"])
        and share < 1
        and not any(o.tensors == "experts" and o.bits == 16 for o in config.overrides)
    ):
        raise ExportError(f"{source}: only {share:.1%} of the expert weights could be quantized; all of them must be")
    facts = QuantizeFacts(
        bits=mean_bits(bits, plan, classes, shapes),
        block_size=job.packing.block_size,
        zero_points=job.packing.zero_points,
        expert_bytes=stored_bytes(experts, checkpoint, plan, job.packing),
        quantized_expert_share=share,
        quantized_bytes=sum(spec.num_bytes for spec in integer_specs),
        num_quantized_tensors=sum(map(is_quantized, plan.values())),
        method=_describe_method(job, plan),
        fewest_expert_tokens=min((count for counts in record.expert_tokens.values() for count in counts), default=None),
        num_matrices_with_few_tokens=record.num_searched,
        tokens_by_layer=record.describe_tokens(),
        routing_by_layer={layer: found.describe() for layer, found in record.routers.items()},
        num_scaled_groups=record.scaling.num_scaled,
        num_groups_best_unscaled=record.scaling.num_best_unscaled,
        num_groups_without_place=record.scaling.num_without_place,
        search=search,
        warnings=tuple(_warnings(job, plan, record)),
    )
    integer_widths = {name: width for name, width in plan.items() if is_quantized(width)}
    scheme = {
        "variant": variant,
        "element_type": job.computes_in,
        "float_type": float_type(variant, device),
        "tensors": integer_widths,
        "expert_tokens": record.expert_tokens,
        "input_scales": record.input_scales,
        "routers": {layer: asdict(found) for layer, found in record.routers.items()},
        **asdict(facts),
    }
    (output / SCHEME_NAME).write_text(
        json.dumps(name_specials(scheme), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return facts


def _describe_method(job: Quantization, plan: Mapping[str, int]) -> str:
    if job.variant == STATIC:
        return "round"
    if job.config.method == "gptq" and job.family is None:
        return "search"
    found = {job.config.method_of(bits): bits for bits in sorted(plan.values()) if is_quantized(bits)}
    if len(found) > 1:
        return ", ".join(f"{method} for {bits} bits" for method, bits in found.items())
    return next(iter(found), job.config.method)


def _warnings(job: Quantization, plan: Mapping[str, int], record: CalibrationRecord) -> Iterator[str]:
    if job.blocks is None or not record.num_searched:
        return
    read = choose_text(job.blocks, job).numel()
    enough = math.ceil(read * record.largest_lack)
    count = sum(is_quantized(bits) for bits in plan.values())
    more = (
        ""
        if enough <= job.blocks.numel()
        else f", and data.max_train_tokens or the text must give as many: it has {job.blocks.numel():,}"
    )
    yield (
        f"{record.num_searched} of {count} matrices saw too few tokens for GPTQ, which needs two for each input, and "
        "have searched scales, which "
        f"lose more; calibration read {read:,} tokens, about {enough:,} are enough; set quantize.calibration_tokens "
        f"to that{more}"
    )


def _search_bits(
    job: Quantization, base: Mapping[str, int], held_out: torch.Tensor | None
) -> tuple[dict[str, int], CalibrationRecord, BitSearch]:
    """Choose the bits of variant 'mixed', and write the twin.

    Every part is quantized in 4 and in 8 bits, and these candidates are measured, each by itself and so without scaled
    inputs and corrected routers, which bind parts together. The twin is quantized anew by the chosen plan, each layer
    behind the others as they are in it, and measured too: it is what must keep to the limit.
    """
    config, family = job.config, job.family
    alone = replace(job, config=config.model_copy(update={"input_scaling": "none", "correct_routers": False}))
    if held_out is None or family is None:
        lacks = (
            "text to choose on; give held-out blocks"
            if family is not None
            else "a decoder family that can run layer by layer; use 'int8' or 'int4'"
        )
        raise ExportError(f"{job.checkpoint.directory}: variant 'mixed' lacks {lacks}")
    shapes = {name: entry.shape for name, entry in job.checkpoint.entries.items()}
    floats = FLOAT_BITS[job.computes_in]
    units, tied = find_units(job.classes, shapes), find_tied(job.checkpoint.config, job.classes, shapes)

    def count_bytes(plan: Mapping[str, int]) -> int:
        return package_bytes({name: shapes[name] for name in plan}, tied, plan, job.packing)

    graph_bytes = rotary_bytes(job.checkpoint.config, floats // 8) + node_bytes(job.checkpoint.config, family)
    check_budget(config, count_bytes(base) + graph_bytes)

    with tempfile.TemporaryDirectory(dir=job.output) as temporary:
        folder = job.scratch or Path(temporary)
        candidates: dict[int, dict[str, TensorEntry]] = {}
        for bits in (4, 8):
            begin(folder / f"{bits}-bits")
            plan = {
                name: bits if any(name in names for names in units.values()) else width for name, width in base.items()
            }
            candidates[bits], _ = write_integers(alone, plan, folder / f"{bits}-bits")

        def read(name: str, bits: int) -> torch.Tensor:
            return dequantize(read_quantized(name, candidates[bits]), shapes[name][-1], bits).reshape(shapes[name])

        ruler = Ruler(job.checkpoint, choose_blocks(held_out, config.search_tokens // held_out.shape[1]))
        options = {unit: options_of(unit, config, floats) for unit in units}
        journal = RecordJournal(folder / "sensitivities")
        sensitivities = measure_units(
            ruler, Candidates(units, options, floats, count_bytes, read), job.progress, journal
        )
        searcher = BitSearcher(
            ruler,
            BitChoices(base, units, sensitivities),
            sensitivities,
            config,
            lambda plan: count_bytes(plan) + graph_bytes,
            read,
            job.progress,
        )
        searcher.choose()
        while True:
            record = write_twin(job, searcher.plan)
            cost = ruler.measure(_Tensors(open_checkpoint(job.output)))
            if not searcher.reject(cost):
                break
        return searcher.plan, record, searcher.result(cost)


class _Tensors(Weights):
    """A checkpoint's tensors, each read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name).to(torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.entries)

    def __len__(self) -> int:
        return len(self._checkpoint.entries)
