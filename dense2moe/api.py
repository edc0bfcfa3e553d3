"""The Python API: a run, its stages, and packages that write text.

Every function takes directories in public formats, writes one new directory, and returns what it found as a frozen
record. A directory gets its name when it is whole, so nothing half-made is left behind. Settings are the records that a
recipe is made of (docs/recipe.md has every key). Nothing is printed, but for bars of transformers while it loads a
model; `progress`, where given, is called with what is being done, how much is done, and how much there is in all. What
a user can mend is a `MendableError`, one line with where, what is, what must be and how to mend it; anything else is a
bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from dense2moe.arguments import PathLike, check_arguments, keep_quiet, read_given_blocks, resume
from dense2moe.convert.package_parity import check_package
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.records import Parity
from dense2moe.export.parity.single_pass import PassParity
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.continuation import GenerateConfig, Package
from dense2moe.export.runtime.prediction import Predictor
from dense2moe.export.runtime.predictions import Entity, FoundAnswer, Prediction, Scored
from dense2moe.export.variant import Device, Variant
from dense2moe.mixtures import Upcycled, add_expert, upcycle
from dense2moe.new_directory import new_directory
from dense2moe.runs import Run, run
from dense2moe.training import branch, finetune
from dense2moe.upcycle.building.config import ExpertsConfig, MergingConfig, RouterConfig, RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.facts import Receipt, SoupLook, SourceDistance
from dense2moe.upcycle.building.growth import GrownMixture
from dense2moe.upcycle.building.growth_router import NewExpertVisits
from dense2moe.upcycle.data import blocks as text_blocks
from dense2moe.upcycle.data.config import (
    ChatData,
    ConllData,
    DataConfig,
    DigitsData,
    DomainsData,
    HubData,
    HubSentencesData,
    HubTableData,
    ImagesData,
    InstalledData,
    InstalledPart,
    PythonDocsData,
    SentencesData,
    TableData,
    TasksData,
    TextData,
)
from dense2moe.upcycle.data.teaching import teach_vectors
from dense2moe.upcycle.errors import MendableError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.config import Distillation, FinetuneConfig, TrainingPhase
from dense2moe.upcycle.training.facts import BranchFacts, FinetuneFacts

__all__ = [
    "BranchConfig",
    "BranchFacts",
    "ChatData",
    "ConllData",
    "DataConfig",
    "Device",
    "DigitsData",
    "Distillation",
    "DomainsData",
    "Entity",
    "ExpertsConfig",
    "FinetuneConfig",
    "FinetuneFacts",
    "FoundAnswer",
    "GenerateConfig",
    "GrownMixture",
    "HubData",
    "HubSentencesData",
    "HubTableData",
    "ImagesData",
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
    "PassParity",
    "Prediction",
    "Predictor",
    "PythonDocsData",
    "QuantizeConfig",
    "QuantizeFacts",
    "Receipt",
    "RouterConfig",
    "RouterDomain",
    "Run",
    "Scored",
    "SentencesData",
    "SoupLook",
    "SourceDistance",
    "TableData",
    "TasksData",
    "TextData",
    "TrainingPhase",
    "UpcycleConfig",
    "Upcycled",
    "Variant",
    "add_expert",
    "branch",
    "check_parity",
    "export_onnx",
    "finetune",
    "prepare_data",
    "quantize",
    "run",
    "upcycle",
]

_BLOCK_SIZE = 256  # as in a recipe


@check_arguments
def prepare_data(
    tokenizer: PathLike, output: PathLike, config: DataConfig, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Cut text into blocks, or encode examples: train, validation and test.

    Args:
        tokenizer: a directory with a tokenizer, such as the dense checkpoint; that itself where texts alone learn its
            vectors.
        output: new directory; each split is a safetensors file with `input_ids`, int32 [blocks, block_size].
        config: text, chats, or examples with labels; files are found below the current directory.
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
        report = progress or keep_quiet
        found = text_blocks.prepare_data(Path(tokenizer), directory, config, Path.cwd(), report)
        teach_vectors(Path(tokenizer), directory, report)
        return found


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
    blocks = read_given_blocks(data, "train")
    held_out = read_given_blocks(data, "validation") if variant == "mixed" else None
    with new_directory(output) as directory:
        return quantize_checkpoint(
            Path(checkpoint),
            directory,
            variant,
            config or QuantizeConfig(),
            progress or keep_quiet,
            QuantizeInputs(
                device, activation_bits, blocks, held_out, None if scratch is None else resume(scratch, progress)
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
        return write_package(Path(twin), directory, config or OnnxConfig(), progress or keep_quiet)


@check_arguments
def check_parity(
    package: PathLike,
    reference: PathLike,
    data: PathLike | Annotated[Sequence[PathLike], Field(min_length=1)] | None = None,
    config: ParityConfig | None = None,
    *,
    twin: PathLike | None = None,
    block_size: PositiveInt = _BLOCK_SIZE,
    num_blocks: PositiveInt | None = None,
    progress: Progress | None = None,
) -> Parity | PassParity:
    """Compare an ONNX package with its torch model, on text.

    A float32 or float16 package must compute what the reference does. A package with rounded weights has weights of its
    own: without `twin` only its perplexity, its files and itself are judged. A package without a cache, of an encoder
    or a model of images, and a package of an encoder and a decoder need no text, and are compared with their twin
    alone: every output, whatever it is.

    Args:
        package: the package, also one of another maker with our names of inputs and outputs.
        reference: the checkpoint that was exported; or the fine-tuned one, where the package is quantized.
        data: text files in UTF-8, held out; of a package without a cache more inputs beside drawn ones.
        config: limits, tasks and ways of feeding.
        twin: a checkpoint with the package's own weights, as `quantize` writes one.
        block_size: tokens of a block.
        num_blocks: blocks at most, taken evenly; all if not given.
        progress: called as the work goes on.

    Returns:
        Figures by execution provider (`Parity`), or comparisons of every layer and output (`PassParity`), and
        `breaches`: every broken limit, a line each. `passed` if there is none.

    Raises:
        MendableError: a file cannot be read, or package and checkpoint are not of one model.

    Example:
        limits = ParityConfig(decode_steps=4, noise_blocks=1, max_perplexity_increase={"int8": 0.5})
        parity = check_parity("int8", "mixture", "corpus.txt", limits, twin="twin", block_size=32, num_blocks=8)
        assert parity.passed, parity.breaches
    """
    files = [Path(data)] if isinstance(data, str | Path) else [Path(file) for file in data or ()]
    return check_package(
        Path(package),
        Path(reference),
        files,
        block_size,
        num_blocks,
        config or ParityConfig(),
        progress or keep_quiet,
        None if twin is None else Path(twin),
    )
