"""Everything that a run uses, read and cross-checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dense2moe.convert.artifact.known import digest_known, find_claimed
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.estimates import estimate_artifacts, estimate_memory, estimate_scratch
from dense2moe.convert.locations import find_data_base, find_router_base, locate_source, name_files
from dense2moe.convert.preparation import FineTuned, Preparation
from dense2moe.convert.recipe.loading import LoadedRecipe, resolve_path
from dense2moe.convert.recipe.records import HubSource, Recipe
from dense2moe.convert.report.license import read_license
from dense2moe.export.lowering_plan import find_export_refusal, plan_lowerings
from dense2moe.export.parity.answers.examples import read_tasks
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.vocabulary import compare_companions
from dense2moe.upcycle.checkpoints.adapter import open_source
from dense2moe.upcycle.checkpoints.class_heads import has_head, put_head
from dense2moe.upcycle.checkpoints.generation_settings import check_generation_config
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.data.blocks import check_data
from dense2moe.upcycle.data.config import LabelledSource, name_domains, reads_images
from dense2moe.upcycle.data.files import match_files, resolve_files
from dense2moe.upcycle.data.vocabulary import Vocabulary
from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.models.context import count_vocabulary, find_context, is_causal
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.record import named_value
from dense2moe.upcycle.tasks.head import VECTORS
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.limits import check_finetune, check_label_loss


def prepare(loaded: LoadedRecipe, progress: Progress) -> Preparation:
    """Read and cross-check everything a run uses; write nothing.

    That is the checkpoint, the plan, the export and the data files.

    Raises:
        RecipeError, UpcycleError, ExportError: in one line each, what is wrong and how to mend it.
    """
    with loaded.telling_lines():
        return _prepare(loaded, progress)


def _prepare(loaded: LoadedRecipe, progress: Progress) -> Preparation:
    recipe = loaded.recipe
    directory, origin = locate_source(loaded)
    checkpoint = open_checkpoint(directory)
    sources = _open_sources(loaded, checkpoint, progress)
    # a branch that is yet to be trained has the dense checkpoint's names and shapes
    others = {name: found.checkpoint for name, found in sources.items()} | dict.fromkeys(recipe.branched, checkpoint)
    plan = plan_upcycle(checkpoint, recipe.upcycle, others, name_domains(recipe.data.source))
    if recipe.branch and not _is_decoder(plan):
        raise RecipeError(
            f"branch: is given, and {plan.conversion.family.architecture} is no decoder; only decoders can be trained; "
            "leave it out"
        )
    labelled = isinstance(recipe.data.source, LabelledSource)
    if not reads_images(recipe.data.source):
        _check_context(loaded, checkpoint)
    if recipe.finetune and (labelled or _is_trained(plan)):
        check_finetune(recipe.finetune, plan.num_layers)
    shapes = {write.spec.name: write.spec.shape for write in plan.writes}
    last_stage = (_find_last_labelled if labelled else _find_last_stage)(plan, shapes, recipe.training_stages)
    variants = recipe.variants if last_stage is None else ()
    lowerings = {v: plan_lowerings(plan.target_config, shapes, v, recipe.quantize, recipe.export) for v in variants}
    base = find_data_base(loaded)
    texts = resolve_files(recipe.data.source, base)
    data_files = {
        f"{where}.{split}/{_name_below(file, base)}": _digest(file)
        for where, splits in texts.items()
        for split, files in splits.items()
        for file in files
    }
    domain_files = _digest_domains(loaded)
    task_paths = [
        resolve_path(path, loaded.path, loaded.name_place("parity", "tasks", number))
        for number, path in enumerate(recipe.parity.tasks)
    ]
    tasks = read_tasks(task_paths)
    vocab_size = count_vocabulary(checkpoint.config)
    remarks = check_generation_config(directory, vocab_size)
    vocabulary = check_data(directory, recipe.data, base, vocab_size)
    if vocabulary is not None:
        _check_head(recipe, checkpoint, plan, vocabulary)
    sizes = estimate_artifacts(checkpoint, plan, shapes, recipe, last_stage[0] if last_stage else None)
    text_bytes = sum(
        Path(file).stat().st_size for splits in texts.values() for files in splits.values() for file in files
    )
    return Preparation(
        loaded=loaded,
        origin=origin,
        checkpoint=checkpoint,
        plan=plan,
        source_files=_digest_source(checkpoint, progress),
        data_files=data_files,
        domain_files=domain_files,
        lowerings=lowerings,
        artifact_bytes=sizes,
        scratch_bytes=estimate_scratch(checkpoint, plan, recipe, sizes),
        last_stage=last_stage,
        license=read_license(directory),
        tasks=tasks,
        task_files={path.name: _digest(path) for path in task_paths},
        memory_bytes=estimate_memory(checkpoint, plan, shapes, recipe, sizes, text_bytes),
        remarks=(*remarks, *(remark for found in sources.values() for remark in found.remarks)),
        sources=sources,
    )


def _open_sources(loaded: LoadedRecipe, base: Checkpoint, progress: Progress) -> dict[str, FineTuned]:
    """The checkpoints and adapters of `sources`, each held against the base."""
    found = {}
    for name, given in loaded.recipe.sources.items():
        directory, origin = locate_source(loaded, name)
        checkpoint = open_source(directory, base)
        found[name] = FineTuned(
            origin=origin,
            hub=given.hub if isinstance(given, HubSource) else None,
            checkpoint=checkpoint,
            files=_digest_source(checkpoint, progress),
            remarks=tuple(compare_companions(base, f"sources.{name}", checkpoint)),
        )
    return found


def _is_decoder(plan: UpcyclePlan) -> bool:
    return plan.conversion.family.task == "text-generation" and is_causal(plan.target_config)


def _check_context(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse blocks longer than the model's context.

    A learned prompt before them counts.
    """
    recipe = loaded.recipe
    context = find_context(checkpoint.config)
    if recipe.data.block_size > context:
        block_size = named_value(recipe.data, "block_size")
        raise RecipeError(f"data.block_size: is {block_size}; must be at most the model's context, which is {context}")
    prompt_tokens = next((phase.prompt_tokens for phase in recipe.training_stages if phase.train == "prompt"), 0)
    if recipe.data.block_size + prompt_tokens > context:
        raise RecipeError(
            f"finetune.prompt_tokens: is {prompt_tokens}, before blocks of {recipe.data.block_size}; "
            f"both together must be at most the model's context, which is {context}"
        )


def _is_trained(plan: UpcyclePlan) -> bool:
    """Whether text alone trains the model."""
    return _is_decoder(plan) or (plan.conversion.keeps_rest and plan.conversion.family.task == "fill-mask")


def _check_head(recipe: Recipe, checkpoint: Checkpoint, plan: UpcyclePlan, found: Vocabulary) -> None:
    """Refuse labels that the model cannot have, or that nothing trains."""
    head = found.head
    if found.task == VECTORS:
        read_pooling(checkpoint.directory)
    put_head(plan.target_config, found.task, head, checkpoint.directory)
    for phase in recipe.training_stages:
        check_label_loss(head, phase)
    if has_head(checkpoint.config, found.task, head):
        return
    what = f"the checkpoint, a {(checkpoint.config.architectures or ['?'])[0]}, has no head for "
    what += "these labels" if found.labels else found.task
    if recipe.finetune is None:
        raise RecipeError(f"finetune: is null, and {what}, which only training gives it; leave `finetune: null` out")
    if recipe.finetune.distillation is not None:
        raise RecipeError(
            f"finetune.distillation: is given, and {what}: there is nothing to learn from; leave it out, or give a "
            "dense model that was trained on them"
        )


def _find_last_labelled(
    plan: UpcyclePlan, shapes: Mapping[str, tuple[int, ...]], _: tuple[FinetuneConfig, ...]
) -> tuple[str, str] | None:
    """The last possible stage with labels, and why the next is not."""
    target = plan.conversion.target.architecture
    if not plan.conversion.keeps_rest:
        return "finetune", f"{target} with labels is not exported; upcycle.target 'mixture' is"
    if (refusal := find_export_refusal(plan.target_config, shapes)) is not None:
        return "finetune", f"export of {target} is not supported yet ({refusal})"
    return None


def _find_last_stage(
    plan: UpcyclePlan, shapes: Mapping[str, tuple[int, ...]], training: tuple[FinetuneConfig, ...]
) -> tuple[str, str] | None:
    """The last possible stage, and why the next is not.

    It depends on the target and its training.
    """
    target = plan.conversion.target.architecture
    if not _is_trained(plan):
        task = plan.conversion.family.task
        if plan.conversion.keeps_rest and task != "text-generation":
            what = f"is for {task}"
        else:
            what = "is no decoder" if is_causal(plan.target_config) else "reads in both directions here"
        is_exported = plan.conversion.keeps_rest and find_export_refusal(plan.target_config, shapes) is None
        beyond = "; quantize and export_onnx of the Python API take what it writes" if is_exported else ""
        known = "a recipe fine-tunes, exports and judges models of the next token or of masked tokens"
        return "upcycle", f"{target} {what}; {known}{beyond}"
    if (refusal := find_export_refusal(plan.target_config, shapes)) is not None:
        return "finetune", f"export of {target} is not supported yet ({refusal})"
    if training and training[-1].train == "prompt":
        return (
            "finetune",
            "a learned prompt cannot be exported to ONNX; it lies beside the model as a peft adapter",
        )
    return None


def _digest_domains(loaded: LoadedRecipe) -> dict[str, str]:
    """SHA-256 of the routers' text files, by domain number."""
    base = find_router_base(loaded)
    return {
        f"{number}/{_name_below(file, base)}": _digest(file)
        for number, domain in enumerate(loaded.recipe.upcycle.router.domains)
        for file in match_files(domain.files, base, f"upcycle.router.domains[{number}].files")
    }


def _digest_source(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """SHA-256 of each of the dense checkpoint's files, by name.

    Weights in the hub's cache, whose headers say their size, have it in their names; stage `source` reads them.
    """
    names = name_files(checkpoint)
    weights = {file.name for file in checkpoint.files}
    digests = {}
    for number, name in enumerate(names):
        progress("reading the dense checkpoint", number, len(names))
        file = checkpoint.directory / name
        digests[name] = (find_claimed(file) if name in weights else None) or _digest(file)
    return digests


def _name_below(file: Path, base: Path) -> str:
    """A file's name below its base, which moves with the recipe."""
    return str(file.relative_to(base) if file.is_relative_to(base) else file)


def _digest(file: Path) -> str:
    with one_line_errors(file, "cannot be read", "mend its mode or its disk, or get it again"):
        return digest_known(file)
