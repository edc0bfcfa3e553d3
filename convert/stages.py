"""The stages: plain functions of directories, bound to the recipe's settings."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from dense2moe.convert.artifact.hashing import digest_file
from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.machine import describe_machine, versions
from dense2moe.convert.recipe.loading import LoadedRecipe, resolve_path
from dense2moe.convert.recipe.records import HUB_ID, HubSource, LocalSource, Recipe
from dense2moe.convert.report.card import read_license, write_card
from dense2moe.convert.report.costs import take_costs
from dense2moe.convert.report.facts import read_facts
from dense2moe.convert.report.names import CARDS_NAME
from dense2moe.convert.report.writer import write_report
from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.errors import ExportError
from dense2moe.export.footprint import estimate_bytes, exporting_memory, parity_memory, quantizing_memory
from dense2moe.export.graph.config import rounds_activations
from dense2moe.export.graph.decoder import find_operator_limit, plan_lowerings
from dense2moe.export.package import write_package
from dense2moe.export.parity.answers.examples import Task, read_tasks
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.variant import QUANTIZED, Variant, element_type, float_type, rounds_to_8_bits
from dense2moe.upcycle.building.hidden_states import read_routers
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.receipt import choose_mode, write_receipt
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints.companions import HUB_IGNORED, TEMPLATES_PATTERN, find_companions
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.loading import check_generation_config
from dense2moe.upcycle.checkpoints.reader import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    check_values,
    open_checkpoint,
    read_config,
    read_index,
    refuse_adapter,
)
from dense2moe.upcycle.data.blocks import (
    check_data,
    find_files,
    match_files,
    prepare_data,
    read_blocks,
    resolve_files,
    text_sources,
)
from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.footprint import IMPORT_BYTES, data_bytes, finetune_bytes, layer_receipt_bytes, receipt_bytes
from dense2moe.upcycle.models.table import find_family
from dense2moe.upcycle.numbers import name_specials
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.record import named_value
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.fine_tuning import HISTORY_NAME, check_finetune, finetune, measure_untrained

Facts = dict[str, Any]
RECEIPT_NAME = "receipt.json"
_OWN_BYTES = 130_000_000  # of the run's own process beside imports: pictures, templates, bars


@dataclass(frozen=True)
class Preparation:
    """What is known before the first byte of work: where the dense checkpoint is, what is in it, and the plan.

    `last_stage` is the last that can be run for this target, with the reason; None where all can. `scratch_bytes` is
    what fine-tuning needs on the disk beside its artifact, while it runs. `license` is what the dense model's own card
    says of its licence. `memory_bytes` is the most memory that each stage is planned to have resident, by label.
    """

    loaded: LoadedRecipe
    origin: str
    checkpoint: Checkpoint
    plan: UpcyclePlan
    source_files: Mapping[str, str]
    data_files: Mapping[str, str]
    domain_files: Mapping[str, str]
    lowerings: Mapping[Variant, tuple[str, ...]]
    artifact_bytes: Mapping[str, int]
    scratch_bytes: int
    last_stage: tuple[str, str] | None
    license: Mapping[str, str]
    tasks: tuple[Task, ...] = ()
    task_files: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """The plan holds functions, which cannot be sent to another process.

        It is made anew there, of the same checkpoint and settings.
        """
        return _plan_again, ({each.name: getattr(self, each.name) for each in fields(self) if each.name != "plan"},)


def _plan_again(known: dict[str, Any]) -> Preparation:
    return Preparation(**known, plan=plan_upcycle(known["checkpoint"], known["loaded"].recipe.upcycle))


@dataclass(frozen=True)
class Job:
    """One run of one stage: the directories that it reads and writes, and what was known before.

    `scratch` outlives a killed run; it may not exist yet, and goes when the artifact is sealed.
    """

    preparation: Preparation
    variant: Variant | None
    inputs: Mapping[str, Path]
    input_facts: Mapping[str, Facts]
    keys: Mapping[str, str]
    output: Path
    scratch: Path
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """The settings."""
        return self.preparation.loaded.recipe


def prepare(loaded: LoadedRecipe, progress: Progress) -> Preparation:
    """Read and cross-check everything that a run will use: checkpoint, plan, export, data files. Writes nothing.

    Raises:
        RecipeError, UpcycleError, ExportError: in one line each, what is wrong and how to mend it.
    """
    recipe = loaded.recipe
    directory, origin = _locate_source(loaded)
    checkpoint = open_checkpoint(directory)
    plan = plan_upcycle(checkpoint, recipe.upcycle)
    context = getattr(checkpoint.config, "max_position_embeddings", recipe.data.block_size)
    if recipe.data.block_size > context:
        block_size = named_value(recipe.data, "block_size")
        raise RecipeError(
            f"{loaded.path}: data.block_size: is {block_size}; must be at most the model's context, which is {context}"
        )
    prompt_tokens = next((stage.prompt_tokens for stage in recipe.training_stages if stage.train == "prompt"), 0)
    if recipe.data.block_size + prompt_tokens > context:
        raise RecipeError(
            f"{loaded.path}: finetune.prompt_tokens: is {prompt_tokens}, before blocks of {recipe.data.block_size}; "
            "both together must be at most "
            f"the model's context, which is {context}"
        )
    shapes = {write.spec.name: write.spec.shape for write in plan.writes}
    if recipe.finetune and plan.conversion.family.task == "text-generation":
        check_finetune(recipe.finetune, plan.num_layers)
    last_stage = _find_last_stage(plan, recipe.training_stages)
    lowerings = {}
    if last_stage is None:
        lowerings = {
            v: plan_lowerings(plan.target_config, shapes, v, recipe.quantize, recipe.export) for v in recipe.variants
        }
    data_files: dict[str, str] = {}
    resolved = resolve_files(recipe.data.source, _data_base(loaded))
    for where, splits in resolved.items():
        for split, files in splits.items():
            data_files |= {f"{where}.{split}/{file}": _digest(file) for file in files}
    domain_files: dict[str, str] = {}
    for number, domain in enumerate(recipe.upcycle.router.domains):
        files = match_files(
            domain.files, _router_base(loaded), f"{loaded.path}: upcycle.router.domains[{number}].files"
        )
        domain_files |= {f"{number}/{file}": _digest(file) for file in files}
    task_paths = [resolve_path(path, loaded.path) for path in recipe.parity.tasks]
    tasks = read_tasks(task_paths)
    check_generation_config(directory)
    check_data(directory, recipe.data, _data_base(loaded), checkpoint.config.vocab_size)
    weights = sorted(
        {entry.file.name for entry in checkpoint.entries.values()}
        | {file.name for file in directory.glob("*.safetensors.index.json")}
    )
    source_names = [CONFIG_NAME, *find_companions(directory), *weights]
    source_files = {}
    for number, name in enumerate(source_names):
        progress("reading the dense checkpoint", number, len(source_names))
        source_files[name] = _digest(directory / name)
    sizes = _artifact_bytes(checkpoint, plan, shapes, loaded, last_stage is None)
    text_bytes = sum(
        Path(file).stat().st_size for splits in resolved.values() for files in splits.values() for file in files
    )
    memory = _memory_bytes(checkpoint, plan, shapes, loaded, sizes, text_bytes)
    scratch = (
        _scratch_bytes(checkpoint, plan, recipe.finetune, sizes["finetune"])
        if recipe.finetune and "finetune" in sizes
        else 0
    )
    return Preparation(
        loaded,
        origin,
        checkpoint,
        plan,
        source_files,
        data_files,
        domain_files,
        lowerings,
        sizes,
        scratch,
        last_stage,
        read_license(directory),
        tasks,
        {path.name: _digest(path) for path in task_paths},
        memory,
    )


def _find_last_stage(plan: UpcyclePlan, training: tuple[FinetuneConfig, ...]) -> tuple[str, str] | None:
    """The last stage that can be run for a target and its training, and why the next cannot."""
    if plan.conversion.family.task != "text-generation":
        return (
            "upcycle",
            f"{plan.conversion.target.architecture} is no decoder, and fine-tuning and export of others are to come",
        )
    try:
        find_decoder_family(plan.target_config)
    except ExportError as error:
        return "finetune", f"export of {plan.conversion.target.architecture} is to come ({error})"
    if (limit := find_operator_limit(plan.target_config)) is not None:
        return "finetune", f"no ONNX model of this shape can run ({limit})"
    if training and training[-1].train == "prompt":
        return (
            "finetune",
            "a learned prompt has no place in an ONNX package, and lies beside the model as an adapter of peft",
        )
    return None


def _locate_source(loaded: LoadedRecipe) -> tuple[Path, str]:
    match loaded.recipe.source:
        case LocalSource(path=path):
            return _resolve_source(path, loaded.path).resolve(), path
        case HubSource(hub=hub, revision=revision):
            return _download(hub, revision), f"{hub}@{revision}"


def _resolve_source(path: str, recipe_path: Path) -> Path:
    """The directory of a local source; one that is not there may be meant as an id of the hub."""
    try:
        return resolve_path(path, recipe_path)
    except RecipeError as error:
        if not re.fullmatch(HUB_ID, path):
            raise
        raise RecipeError(f"{error}, or write `source: {{hub: {path}}}` for a model of the Hugging Face hub") from error


def _download(hub: str, revision: str) -> Path:
    """A model of the hub, as far as it is needed.

    What belongs to it, and then, of one commit, the weights that its index names.
    """
    from huggingface_hub import snapshot_download  # only a hub source needs it

    remedy = "check the id, or give a path"
    with one_line_errors(Path(hub), f"revision '{revision}' cannot be fetched from the hub", remedy, RecipeError):
        directory = Path(snapshot_download(hub, revision=revision, ignore_patterns=list(HUB_IGNORED)))
    refuse_adapter(directory)
    config = read_config(directory)
    # before gigabytes are fetched for nothing
    find_family(config.model_type, config.architectures, str(directory / CONFIG_NAME), config)
    weights = read_index(directory) if (directory / INDEX_NAME).is_file() else ()
    names = [escape(name) for name in (SINGLE_NAME, *weights)]
    with one_line_errors(
        Path(hub), f"the weights of revision '{revision}' cannot be fetched from the hub", remedy, RecipeError
    ):
        return Path(snapshot_download(hub, revision=directory.name, allow_patterns=[*names, TEMPLATES_PATTERN]))


def _data_base(loaded: LoadedRecipe) -> Path:
    sources = text_sources(loaded.recipe.data.source)
    return _text_base(loaded, next(iter(sources.values())).train[0]) if sources else Path.cwd()


def _router_base(loaded: LoadedRecipe) -> Path:
    files = [file for domain in loaded.recipe.upcycle.router.domains for file in domain.files]
    return _text_base(loaded, files[0]) if files else Path.cwd()


def _text_base(loaded: LoadedRecipe, first: str) -> Path:
    """Text files are named beside the recipe, or below the current directory, as the source is.

    The first file given decides which.
    """
    beside = loaded.path.absolute().parent
    return beside if find_files(first, beside) else Path.cwd()


def _artifact_bytes(
    checkpoint: Checkpoint,
    plan: UpcyclePlan,
    shapes: Mapping[str, tuple[int, ...]],
    loaded: LoadedRecipe,
    exported: bool,
) -> dict[str, int]:
    recipe = loaded.recipe
    sizes = {"upcycle": plan.num_bytes}
    if recipe.finetune and plan.conversion.family.task == "text-generation":
        wide = recipe.finetune.resolve_stages()[-1].dtype == "float32"
        mixture, dense = (
            4 * num_parameters if wide else num_bytes for num_parameters, num_bytes in _sizes(checkpoint, plan)
        )
        sizes["finetune"] = mixture + (2 * dense if recipe.finetune.control else 0)
    if not exported:
        return sizes
    for variant in recipe.variants:
        sizes[f"onnx-{variant}"], sizes[f"quantize-{variant}"] = estimate_bytes(
            plan.target_config, shapes, variant, recipe.quantize, recipe.export.device, recipe.export.lowering
        )
    return sizes


def _sizes(checkpoint: Checkpoint, plan: UpcyclePlan) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters and bytes, as stored, of the mixture and of the dense model."""
    return (plan.num_parameters, plan.num_bytes), (checkpoint.num_parameters, checkpoint.num_bytes)


def _memory_bytes(
    checkpoint: Checkpoint,
    plan: UpcyclePlan,
    shapes: Mapping[str, tuple[int, ...]],
    loaded: LoadedRecipe,
    sizes: Mapping[str, int],
    text_bytes: int,
) -> dict[str, int]:
    """The most memory that each stage has resident, by label; of the light stages, what the run's own process has."""
    recipe, own = loaded.recipe, IMPORT_BYTES + _OWN_BYTES
    block_size = recipe.data.block_size
    planned = {"source": own, "data": data_bytes(text_bytes)}
    whole = choose_mode(plan, checkpoint, block_size) == "whole"
    planned["upcycle"] = receipt_bytes(plan, checkpoint, block_size) if whole else layer_receipt_bytes(plan, checkpoint)
    if recipe.finetune and "finetune" in sizes:
        planned["finetune"] = finetune_bytes(plan, checkpoint, recipe.finetune, recipe.data)
    for variant in recipe.variants:
        if (package := sizes.get(f"onnx-{variant}")) is not None:
            config = plan.target_config
            planned[f"quantize-{variant}"] = IMPORT_BYTES + quantizing_memory(config, shapes, variant, recipe.quantize)
            planned[f"onnx-{variant}"] = IMPORT_BYTES + exporting_memory(
                shapes, package, recipe.export.lowering == "auto"
            )
            longest_row = min(recipe.parity.longest_row, int(config.max_position_embeddings))
            noise = recipe.parity.noise_blocks > 0 and not rounds_activations(variant, recipe.export)
            planned[f"parity-{variant}"] = IMPORT_BYTES + parity_memory(
                config, plan.num_parameters, package, block_size, longest_row, noise
            )
    return planned | ({"report": own} if any(label.startswith("onnx") for label in sizes) else {})


def _scratch_bytes(checkpoint: Checkpoint, plan: UpcyclePlan, finetune: FinetuneConfig, artifact_bytes: int) -> int:
    """The weights after every stage.

    And of the model that takes most the best checkpoint, the latest and the one being written. A checkpoint is what
    learns in float32 with AdamW's two moments. Routers, low-rank updates and a prompt are next to nothing.
    """
    stages = finetune.resolve_stages()
    mixture = plan.num_parameters if any(stage.train not in ("router", "lora", "prompt") for stage in stages) else 0
    control = (
        checkpoint.num_parameters
        if finetune.control and any(stage.train not in ("lora", "prompt") for stage in stages)
        else 0
    )
    return len(stages) * artifact_bytes + 3 * 3 * 4 * max(mixture, control)


def _digest(file: Path) -> str:
    with one_line_errors(file, "cannot be read", "mend its mode or its disk, or get it again"):
        return digest_file(file)


# Settings: what of the recipe, and of the world, decides a stage's output.


def source_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """What is in the dense checkpoint, and where it is."""
    return {"directory": str(preparation.checkpoint.directory), "files": dict(preparation.source_files)}


def data_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """The text that is meant, down to the digests of its files."""
    data = preparation.loaded.recipe.data
    interpreter = platform.python_version() if data.source.kind == "python-docs" else None
    return {**data.model_dump(mode="json"), "files": dict(preparation.data_files), "interpreter": interpreter}


def upcycle_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """Experts, router and seed."""
    recipe = preparation.loaded.recipe
    settings = recipe.upcycle.model_dump(mode="json")
    return {
        **settings,
        "domain_files": dict(preparation.domain_files),
        "block_size": recipe.data.block_size,
        "seed": recipe.seed,
    }


def finetune_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """The training recipe; without fine-tuning only figures are taken, which need no settings."""
    recipe = preparation.loaded.recipe
    return {**recipe.finetune.model_dump(mode="json"), "seed": recipe.seed} if recipe.finetune else {"off": True}


def quantize_settings(preparation: Preparation, variant: Variant | None) -> Facts:
    """Bits and blocks of one variant, and what its graph computes in."""
    assert variant is not None
    recipe = preparation.loaded.recipe
    settings = recipe.quantize.model_dump(mode="json") if variant in QUANTIZED else {}
    types = {
        "element_type": element_type(variant, recipe.export.device),
        "float_type": float_type(variant, recipe.export.device),
    }
    rounds = (
        {"activation_bits": recipe.export.activation_bits} if rounds_to_8_bits(variant, recipe.export.device, 8) else {}
    )
    return {"variant": variant, **types, **settings, **rounds}


def onnx_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """The graph."""
    return preparation.loaded.recipe.export.model_dump(mode="json")


def parity_settings(preparation: Preparation, variant: Variant | None) -> Facts:
    """Thresholds, and what they are applied to."""
    recipe = preparation.loaded.recipe
    assert variant is not None
    rounds = rounds_activations(variant, recipe.export)
    return {
        **recipe.parity.model_dump(mode="json"),
        "task_files": dict(preparation.task_files),
        "variant": variant,
        "rounds_activations": rounds,
    }


def report_settings(preparation: Preparation, _: Variant | None) -> Facts:
    """The recipe as it was written, and what the model cards say beside it."""
    return {"name": preparation.loaded.name, "recipe": preparation.loaded.text, "license": dict(preparation.license)}


# Stages


def run_source(job: Job) -> Facts:
    """Links to the dense checkpoint's files, every value that something is made of read once and found finite.

    They are relative: work directory and checkpoint can be moved together, or be seen at another place from a
    container.
    """
    checkpoint = job.preparation.checkpoint
    for number, _ in enumerate(check_values(checkpoint, job.preparation.plan.dropped), 1):
        job.progress("checking values", number, len(checkpoint.entries))
    for name in job.preparation.source_files:
        link = job.output / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath((checkpoint.directory / name).resolve(), link.parent.resolve()))
    return {
        "origin": job.preparation.origin,
        "architecture": (checkpoint.config.architectures or ["?"])[0],
        "num_parameters": checkpoint.num_parameters,
        "num_bytes": checkpoint.num_bytes,
        "dtype": ", ".join(sorted({entry.dtype for entry in checkpoint.entries.values()})),
    }


def run_data(job: Job) -> Facts:
    """Held-out and training text as blocks of tokens."""
    return prepare_data(
        job.inputs["source"], job.output, job.recipe.data, _data_base(job.preparation.loaded), job.progress
    )


def run_upcycle(job: Job) -> Facts:
    """The mixture of experts, and the receipt that it computes what the dense model does."""
    config, seed, source = job.recipe.upcycle, job.recipe.seed, job.inputs["source"]
    blocks = read_blocks(job.inputs["data"], "train")
    reading = read_routers(source, config, blocks, _router_base(job.preparation.loaded), seed, job.progress)
    routers = reading.routers if reading else None
    plan = upcycle(source, job.output, config, seed, job.progress, routers)
    num_written = check_written(source, job.output, plan, seed, job.progress, routers)
    receipt = write_receipt(source, job.output, plan, job.recipe.data.block_size, job.progress)
    (job.output / RECEIPT_NAME).write_text(
        json.dumps(name_specials(asdict(receipt)), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return {
        "target": plan.conversion.target.architecture,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_layers": plan.num_layers,
        "num_sparse_layers": len(plan.sites),
        "num_parameters": plan.num_parameters,
        "num_active_parameters": plan.num_active_parameters,
        "num_bytes": plan.num_bytes,
        "dropped": list(plan.dropped),
        "keeps_function": plan.keeps_function,
        "num_tensors_compared": num_written,
        "router_text_tokens": list(reading.num_tokens) if reading else [],
        "router_loads": {str(site): load for site, load in reading.loads.items()} if reading else {},
        "receipt_mode": receipt.mode,
        "receipt_notes": list(receipt.notes),
        "receipt": [asdict(line) for line in receipt.comparisons],
    }


def run_finetune(job: Job) -> Facts:
    """The fine-tuned mixture, and the dense control.

    The history is in a file beside them: megabytes where there are many experts.
    Where fine-tuning is switched off, no model: the held-out figures of the dense and the upcycled model alone.
    """
    source, mixture, data, settings = *(job.inputs[name] for name in ("source", "upcycle", "data")), job.recipe.finetune
    if settings is None:
        facts = measure_untrained(source, mixture, data, job.output, job.progress)
    else:
        facts = finetune(source, mixture, data, job.output, settings, job.recipe.seed, job.progress, job.scratch)
    return {name: value for name, value in _jsonable(facts).items() if name != "history"}


def run_quantize(job: Job) -> Facts:
    """Integers and scales, and the torch twin that computes with them."""
    assert job.variant is not None
    recipe, data = job.recipe, job.inputs["data"]
    return _jsonable(
        quantize_checkpoint(
            job.inputs["finetune"],
            job.output,
            job.variant,
            recipe.quantize,
            job.progress,
            QuantizeInputs(
                device=recipe.export.device,
                activation_bits=recipe.export.activation_bits,
                blocks=read_blocks(data, "train"),
                held_out=read_blocks(data, "validation") if job.variant == "mixed" else None,
                scratch=job.scratch,
            ),
        )
    )


def run_onnx(job: Job) -> Facts:
    """The ONNX package."""
    return _jsonable(write_package(job.inputs["quantize"], job.output, job.recipe.export, job.progress))


def run_parity(job: Job) -> Facts:
    """The package against its twin and against the fine-tuned model.

    Thresholds are judged after the report is written.
    """
    assert job.variant is not None
    trained = job.recipe.finetune is not None
    parity = check_parity(
        ParitySubject(
            job.inputs["onnx"],
            job.inputs["quantize"],
            job.inputs["finetune"],
            read_blocks(job.inputs["data"], "test"),
            job.variant,
            rounds_activations(job.variant, job.recipe.export),
            tasks=job.preparation.tasks,
            finetuned_losses=job.input_facts["finetune"]["evaluations"]["fine-tuned"]["block_losses"]
            if trained
            else None,
        ),
        job.recipe.parity,
        job.progress,
    )
    facts = {**_jsonable(parity), "passed": parity.passed}
    if not trained:  # parity calls the model that was exported the fine-tuned one
        facts["breaches"] = [breach.replace("fine-tuned model", "upcycled model") for breach in facts["breaches"]]
    (job.output / "parity.json").write_text(
        json.dumps(name_specials(facts), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return facts


def run_report(job: Job) -> Facts:
    """The page, the same facts as JSON, and a model card for each variant."""
    source = job.recipe.source
    facts: Facts = {
        "dense2moe": version("dense2moe"),
        "name": job.preparation.loaded.name,
        "seed": job.recipe.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": asdict(describe_machine()),
        "recipe": job.preparation.loaded.text,
        "keys": dict(job.keys),
        "digests": {
            label: _digests(job.inputs[label]) for label in job.inputs if label == "source" or label.startswith("onnx-")
        },
        "base_model": source.hub if isinstance(source, HubSource) else None,
        "license": dict(job.preparation.license),
        "variants": {},
    }
    found, facts["costs"] = take_costs(job.input_facts)
    for label, stage_facts in found.items():
        stage, _, variant = label.partition("-")
        if variant:
            facts["variants"].setdefault(variant, {})[stage] = stage_facts
        else:
            facts[stage] = stage_facts
    history = [
        json.loads(line) for line in (job.inputs["finetune"] / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    ]
    write_report({**facts, "finetune": {**facts["finetune"], "history": history}}, job.output)
    records = read_facts(facts, job.preparation.loaded.name)
    for variant in facts["variants"]:
        write_card(records, variant, job.inputs[f"onnx-{variant}"], job.output / CARDS_NAME / variant)
    return facts


def _digests(artifact: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact."""
    return {name: record["sha256"] for name, record in open_artifact(artifact).manifest["files"].items()}


def _jsonable(facts: Any) -> Facts:
    assert is_dataclass(facts)
    assert not isinstance(facts, type)
    return cast(Facts, json.loads(json.dumps(asdict(facts))))


StageFunction = Callable[[Job], Facts]
