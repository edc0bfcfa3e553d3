"""The Python API: a run, its stages, and packages that write text.

Every function takes directories in public formats, writes one new directory, and returns what it found as a frozen
record. A directory gets its name when it is whole, so nothing half-made is left behind. Settings are the records that a
recipe is made of (docs/recipe.md has every key). Nothing is printed, but for bars of transformers while it loads a
model; `progress`, where given, is called with what is being done, how much is done, and how much there is in all. What
a user can mend is a `MendableError`, one line with where, what is, what must be and how to mend it; anything else is a
bug.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dense2moe.arguments import check_arguments
from dense2moe.convert.package_parity import check_package
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.records import Parity
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.continuation import GenerateConfig, Package
from dense2moe.export.variant import Device, Variant
from dense2moe.new_directory import new_directory
from dense2moe.runs import Run, run
from dense2moe.upcycle.building.config import ExpertsConfig, MergingConfig, RouterConfig, RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.facts import Receipt, SoupLook, SourceDistance
from dense2moe.upcycle.building.growth import GrownMixture, RouterRow, RowSettings
from dense2moe.upcycle.building.growth import add_expert as grow
from dense2moe.upcycle.building.growth_router import NewExpertVisits
from dense2moe.upcycle.building.making import make_mixture
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.vocabulary import compare_companions
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.data import blocks as text_blocks
from dense2moe.upcycle.data.config import (
    DataConfig,
    DomainsData,
    HubData,
    InstalledData,
    InstalledPart,
    PythonDocsData,
    TextData,
)
from dense2moe.upcycle.data.examples import Examples, read_examples
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.durable import discard_damage
from dense2moe.upcycle.errors import MendableError, UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training import fine_tuning
from dense2moe.upcycle.training.config import Distillation, FinetuneConfig, TrainingPhase
from dense2moe.upcycle.training.facts import FinetuneFacts

__all__ = [
    "DataConfig",
    "Device",
    "Distillation",
    "DomainsData",
    "ExpertsConfig",
    "FinetuneConfig",
    "FinetuneFacts",
    "GenerateConfig",
    "GrownMixture",
    "HubData",
    "InstalledData",
    "InstalledPart",
    "MendableError",
    "MergingConfig",
    "NewExpertVisits",
    "OnnxConfig",
    "OnnxFacts",
    "Package",
    "Parity",
    "ParityConfig",
    "PythonDocsData",
    "QuantizeConfig",
    "QuantizeFacts",
    "Receipt",
    "RouterConfig",
    "RouterDomain",
    "Run",
    "SoupLook",
    "SourceDistance",
    "TextData",
    "TrainingPhase",
    "UpcycleConfig",
    "Upcycled",
    "Variant",
    "add_expert",
    "check_parity",
    "export_onnx",
    "finetune",
    "prepare_data",
    "quantize",
    "run",
    "upcycle",
]

PathLike = str | Path
_BLOCK_SIZE = 256  # as in a recipe
_NO_TEXT = Examples(torch.zeros((0, _BLOCK_SIZE), dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class Upcycled:
    """A mixture that was written.

    Attributes:
        plan: where every tensor came from, and the sizes of the mixture.
        receipt: how its logits compare with the dense model's.
        distances: how far each source is from the dense model, by class of tensor.
        soup: of a greedy soup every look, with the held-out loss of the models averaged, and which stayed.
        remarks: how sources differ from the dense model beside their weights, a line each.
    """

    plan: UpcyclePlan
    receipt: Receipt
    distances: tuple[SourceDistance, ...] = ()
    soup: tuple[SoupLook, ...] = ()
    remarks: tuple[str, ...] = ()


@check_arguments
def prepare_data(
    tokenizer: PathLike, output: PathLike, config: DataConfig, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Cut text into blocks of tokens: splits train, validation and test.

    Args:
        tokenizer: a directory with a tokenizer, such as the dense checkpoint.
        output: new directory; each split is a safetensors file with `input_ids`, int32 [blocks, block_size].
        config: the text; files are found below the current directory.
        progress: called as the work goes on.

    Returns:
        Tokens of each split, names of the domains, and a digest of the text.

    Raises:
        MendableError: no tokenizer, no text, or too little text for a block in each split.

    Example:
        text = TextData(kind="text", train=("corpus.txt",), separator="---")
        found = prepare_data("dense", "data", DataConfig(source=text, block_size=32))
    """
    with new_directory(output) as directory:
        return text_blocks.prepare_data(Path(tokenizer), directory, config, Path.cwd(), progress or _quiet)


@check_arguments
def upcycle(
    dense: PathLike,
    output: PathLike,
    config: UpcycleConfig | None = None,
    *,
    data: PathLike | None = None,
    seed: NonNegativeInt = 0,
    sources: Mapping[str, PathLike] | None = None,
    progress: Progress | None = None,
) -> Upcycled:
    """Make a mixture of experts from a dense checkpoint, and compare both.

    With `sources`, which are fine-tuned from it, their FFNs become the experts, and the rest is merged. Memory does not
    grow with the model while it is written. The result is an architecture of transformers, which loads without code of
    ours.

    Args:
        dense: a Hugging Face checkpoint in safetensors.
        output: new directory of the mixture.
        config: experts, router, layers; 8 experts and top-2 if not given, or one expert a source.
        data: a directory of `prepare_data`: training text for routers that are read from it, validation text for a
            greedy soup.
        seed: seed of the router, the noise and the neurons that are drawn.
        sources: checkpoints, or LoRA adapters as peft writes them, by name.
        progress: called as the work goes on.

    Returns:
        The plan that was carried out, and the receipt: relative errors of logits in three dtypes. Of sources, how far
        they are from the dense checkpoint.

    Raises:
        MendableError: the checkpoint cannot be upcycled so, or what was written does not compute what the dense model
            computes; nothing is left then.

    Example:
        made = upcycle("dense", "mixture", UpcycleConfig(num_experts=4, num_experts_per_tok=2), seed=1)
        print(made.plan.num_parameters, made.plan.num_active_parameters)
        print(max(line.rel for line in made.receipt.comparisons if line.dtype == "float32"))
    """
    config, source = config or UpcycleConfig(), Path(dense)
    if data is None and config.router.kind != "normal" and not config.router.domains:
        raise UpcycleError(
            f"upcycle.router: kind '{config.router.kind}' has no domains; give them, or `data` with training text"
        )
    if data is None and config.merging.method == "greedy-soup" and sources:
        raise UpcycleError("upcycle.merging: method 'greedy-soup' chooses by held-out loss; give `data`")
    base, paths = open_checkpoint(source), {name: Path(path) for name, path in (sources or {}).items()}
    others = open_sources(base, paths)
    remarks = tuple(
        remark for name, other in others.items() for remark in compare_companions(base, f"sources.{name}", other)
    )
    plan = plan_upcycle(base, config, others)
    with new_directory(output) as directory:
        training = _NO_TEXT if data is None else read_examples(Path(data), "train")
        block_size = min(training.block_size, int(getattr(plan.target_config, "max_position_embeddings", _BLOCK_SIZE)))
        made = make_mixture(
            source,
            directory,
            plan,
            training,
            Path.cwd(),
            seed,
            block_size,
            progress or _quiet,
            paths,
            _read_blocks(data, "validation"),
        )
    return Upcycled(made.plan, made.receipt, made.distances, made.soup, remarks)


@check_arguments
def add_expert(
    mixture: PathLike,
    source: PathLike,
    output: PathLike,
    *,
    base: PathLike | None = None,
    router: RouterRow = "mean",
    domain: RouterDomain | None = None,
    others: Sequence[RouterDomain] = (),
    scale: PositiveFloat | None = None,
    seed: NonNegativeInt = 0,
    progress: Progress | None = None,
) -> GrownMixture:
    """Add a dense model to a finished mixture, as one more expert.

    Every sparse layer gets its FFN. All that the mixture has is copied bit by bit, all that is written is read again,
    and memory does not grow with the model. What the source has learned outside of its FFNs is left out. A router row
    that is read from text of the new domain finds its tokens; any other knows nothing of it before the routers are
    fine-tuned on text that has it.

    Args:
        mixture: the mixture's checkpoint, whose experts are whole FFNs.
        source: a checkpoint fine-tuned from the mixture's base, or a LoRA adapter as peft writes it.
        output: new directory of the grown mixture.
        base: the dense checkpoint that an adapter was trained on; for adapters alone.
        router: "mean": the mean of the others' rows, so that its logit is the mean of theirs, never the largest;
            "normal": drawn, as large as the others; "ridge": read from `domain` beside `others`; "nexus": projected
            from `domain` alone, for mixtures whose router was of kind "nexus".
        domain: text of the new expert's domain; files are found below the current directory.
        others: text of domains that the mixture knows.
        scale: factor of the new expert's output; a mixture with a shared expert needs it: 0.5 where the shared expert
            was made to give one half.
        seed: seed of a drawn row.
        progress: called as the work goes on.

    Returns:
        Experts of a layer, the layers, parameters, and how the source differs beside its weights. With `domain`, how
        many of its tokens, of a part kept back, visit the new expert in each layer, and how many of the others'.

    Raises:
        MendableError: the source's FFN cannot be an expert of the mixture: another base, width or activation, or
            granular or split experts; or text is missing. Nothing is left then.

    Example:
        law = RouterDomain(files=("corpus.txt",))
        grown = add_expert("mixture", "dense", "grown", domain=law)
        print(grown.num_experts, grown.num_new_parameters, [layer.own for layer in grown.visits])
    """
    adapted = None if base is None else Path(base)
    row = RowSettings(router, seed, domain, tuple(others))
    with new_directory(output) as directory:
        return grow(Path(mixture), Path(source), directory, row, progress or _quiet, adapted, scale)


@check_arguments
def finetune(
    dense: PathLike,
    mixture: PathLike,
    data: PathLike,
    output: PathLike,
    config: FinetuneConfig | None = None,
    *,
    seed: NonNegativeInt = 0,
    scratch: PathLike | None = None,
    progress: Progress | None = None,
) -> FinetuneFacts:
    """Fine-tune a mixture briefly, beside the dense model as its control.

    Args:
        dense: the dense checkpoint: parent of a distillation, and the control's start.
        mixture: the mixture's checkpoint.
        data: a directory of `prepare_data`.
        output: new directory of the fine-tuned mixture, with `history.jsonl` and the controls.
        config: what learns, for how long and at which rate.
        seed: seed of the order of blocks and of dropout.
        scratch: directory of checkpoints: a killed call that is made again with the same arguments resumes there. The
            caller deletes it when all is well. Nothing is kept if not given.
        progress: called as the work goes on.

    Returns:
        Held-out losses and figures of each model (losses in nats), the history, which step was kept, seconds.

    Raises:
        MendableError: the loss became NaN or infinite, memory ran out, or settings, model and data do not fit together.

    Example:
        settings = FinetuneConfig(steps=2, warmup_steps=0, eval_steps=1, batch_size=2, control=False)
        facts = finetune("dense", "mixture", "data", "tuned", settings)
        print(facts.best_steps, facts.warnings)
    """
    with new_directory(output) as directory, tempfile.TemporaryDirectory(dir=directory.parent) as own:
        kept = _resume(scratch or own, progress)
        settings = (config or FinetuneConfig(), seed, progress or _quiet, kept)
        return fine_tuning.finetune(Path(dense), Path(mixture), Path(data), directory, *settings)


@check_arguments
def quantize(
    checkpoint: PathLike,
    output: PathLike,
    variant: Variant,
    config: QuantizeConfig | None = None,
    *,
    data: PathLike | None = None,
    device: Device = "cpu",
    activation_bits: Literal[8, 32] = 8,
    scratch: PathLike | None = None,
    progress: Progress | None = None,
) -> QuantizeFacts:
    """Choose a checkpoint's integers and scales, and write its torch twin.

    Routers and norms stay in float32. Memory holds one layer at a time.

    Args:
        checkpoint: a mixture, or any decoder.
        output: new directory of the twin: a plain checkpoint with the dequantized weights, and the integers beside it.
        variant: "float32", "float16", "bfloat16", "int8", "int8-qdq", "int4" or "mixed".
        config: method, groups and bits of each class of tensors.
        data: a directory of `prepare_data`: calibration text for GPTQ and scaled inputs, and for "mixed" validation
            text. Without it scales are searched, which needs no text.
        device: "cuda" has quantized variants compute in float16.
        activation_bits: bits in which quantized products read their inputs on the CPU: 8 or 32.
        scratch: directory of progress: a killed call that is made again with the same arguments resumes there. The
            caller deletes it when all is well. Nothing is kept if not given.
        progress: called as the work goes on.

    Returns:
        Bits of each class of tensors, bytes, and what calibration saw.

    Raises:
        MendableError: the architecture is not covered, an expert would stay unquantized, a weight is NaN, infinite or
            beyond float16's range where that is needed, or no bits keep to the limits of "mixed".

    Example:
        facts = quantize("mixture", "twin", "int8", QuantizeConfig(block_size=16), data="data")
        print(facts.bits, facts.quantized_bytes)
    """
    blocks = _read_blocks(data, "train")
    held_out = _read_blocks(data, "validation") if variant == "mixed" else None
    with new_directory(output) as directory:
        return quantize_checkpoint(
            Path(checkpoint),
            directory,
            variant,
            config or QuantizeConfig(),
            progress or _quiet,
            QuantizeInputs(
                device, activation_bits, blocks, held_out, None if scratch is None else _resume(scratch, progress)
            ),
        )


@check_arguments
def export_onnx(
    twin: PathLike, output: PathLike, config: OnnxConfig | None = None, *, progress: Progress | None = None
) -> OnnxFacts:
    """Write a checkpoint as an ONNX package for prefill and decode.

    One graph serves both, with a KV cache. An architecture without a builder is traced, which needs the
    extra `[trace]`.

    Args:
        twin: a directory of `quantize`, also of variant "float32".
        output: new directory of the package, which onnxruntime and onnxruntime-genai load.
        config: the device, and how experts are written.
        progress: called as the work goes on.

    Returns:
        The lowering and how it was chosen, the number of nodes, and bytes.

    Raises:
        MendableError: the architecture or the lowering is not covered.

    Example:
        facts = export_onnx("twin", "int8", OnnxConfig(lowering="grouped"))
        print(facts.lowering, facts.package_bytes)
    """
    with new_directory(output) as directory:
        return write_package(Path(twin), directory, config or OnnxConfig(), progress or _quiet)


@check_arguments
def check_parity(
    package: PathLike,
    reference: PathLike,
    data: PathLike | Annotated[Sequence[PathLike], Field(min_length=1)],
    config: ParityConfig | None = None,
    *,
    twin: PathLike | None = None,
    block_size: PositiveInt = _BLOCK_SIZE,
    num_blocks: PositiveInt | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Compare an ONNX package with its torch model, on text.

    A float32 or float16 package must compute what the reference does. A package with rounded weights has weights of its
    own: without `twin` only its perplexity, its files and itself are judged.

    Args:
        package: the package, also one of another maker with our names of inputs and outputs.
        reference: the checkpoint that was exported; or the fine-tuned one, where the package is quantized.
        data: text files in UTF-8, held out.
        config: limits, tasks and ways of feeding.
        twin: a checkpoint with the package's own weights, as `quantize` writes one.
        block_size: tokens of a block.
        num_blocks: blocks at most, taken evenly; all if not given.
        progress: called as the work goes on.

    Returns:
        Figures by execution provider, and `breaches`: every broken limit, a line each. `passed` if there is none.

    Raises:
        MendableError: a file cannot be read, or package and checkpoint are not of one model.

    Example:
        limits = ParityConfig(decode_steps=4, noise_blocks=1, max_perplexity_increase={"int8": 0.5})
        parity = check_parity("int8", "mixture", "corpus.txt", limits, twin="twin", block_size=32, num_blocks=8)
        assert parity.passed, parity.breaches
    """
    files = [Path(data)] if isinstance(data, str | Path) else [Path(file) for file in data]
    return check_package(
        Path(package),
        Path(reference),
        files,
        block_size,
        num_blocks,
        config or ParityConfig(),
        progress or _quiet,
        None if twin is None else Path(twin),
    )


def _quiet(*_: object) -> None:
    """Progress that nobody sees."""


def _read_blocks(data: PathLike | None, split: Split) -> torch.Tensor | None:
    return None if data is None else text_blocks.read_blocks(Path(data), split)


def _resume(scratch: PathLike, progress: Progress | None) -> Path:
    """What a killed call has kept, undamaged.

    What a power cut damaged is deleted.
    """
    discard_damage(Path(scratch), progress or _quiet)
    return Path(scratch)
