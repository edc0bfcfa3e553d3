"""The pipeline: one table of stages, and the walk over it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from dense2moe.convert import stages
from dense2moe.convert.artifact.disk import check_space, describe_os_error
from dense2moe.convert.artifact.keys import artifact_key, code_digest
from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.artifact.manifest import Artifact
from dense2moe.convert.artifact.sealing import build, delete_leftovers, find, resume_directory
from dense2moe.convert.artifact.verification import check_files
from dense2moe.convert.errors import ArtifactError, RecipeError
from dense2moe.convert.machine import peak_resident_bytes, versions
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.report.costs import COST
from dense2moe.convert.report.facts import StageCost
from dense2moe.convert.run_state import RunState, Status, write_run
from dense2moe.convert.stage_names import STAGE_NAMES, StageName
from dense2moe.convert.stages import Facts, Job, Preparation, StageFunction
from dense2moe.convert.worker import run_apart
from dense2moe.export.variant import Variant
from dense2moe.upcycle.durable import discard_damage
from dense2moe.upcycle.errors import MendableError, find_os_error, is_out_of_memory
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.processes import have_group, join_processes, tell

_SMALL_BYTES = 32_000_000
"""Of an input's file, the most that a light stage reads: configs, a training history; weights it leaves alone."""


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline. A stage that runs for each variant reads the same variant of the stages that do too.

    A stage that is `light` runs in the run's own process, any other in one of its own. Under `accelerate launch` the
    first process runs every stage, and the others help in those of `all_processes`, which are then run by the launched
    processes themselves.
    """

    name: StageName
    reads: tuple[StageName, ...]
    settings: Callable[[Preparation, Variant | None], Facts]
    run: StageFunction
    code: tuple[str, ...]
    each_variant: bool = False
    all_processes: bool = False
    light: bool = False


PIPELINE: tuple[Stage, ...] = (
    Stage("source", (), stages.source_settings, stages.run_source, ("dense2moe.upcycle",), light=True),
    Stage("data", ("source",), stages.data_settings, stages.run_data, ("dense2moe.upcycle",)),
    Stage("upcycle", ("source", "data"), stages.upcycle_settings, stages.run_upcycle, ("dense2moe.upcycle",)),
    Stage(
        "finetune",
        ("source", "data", "upcycle"),
        stages.finetune_settings,
        stages.run_finetune,
        ("dense2moe.upcycle",),
        all_processes=True,
    ),
    Stage(
        "quantize",
        ("finetune", "data"),
        stages.quantize_settings,
        stages.run_quantize,
        ("dense2moe.upcycle", "dense2moe.export"),
        each_variant=True,
    ),
    Stage(
        "onnx",
        ("quantize",),
        stages.onnx_settings,
        stages.run_onnx,
        ("dense2moe.upcycle", "dense2moe.export"),
        each_variant=True,
    ),
    Stage(
        "parity",
        ("data", "finetune", "quantize", "onnx"),
        stages.parity_settings,
        stages.run_parity,
        ("dense2moe.upcycle", "dense2moe.export"),
        each_variant=True,
    ),
    Stage(
        "report",
        ("source", "data", "upcycle", "finetune", "quantize", "onnx", "parity"),
        stages.report_settings,
        stages.run_report,
        ("dense2moe.upcycle", "dense2moe.export", "dense2moe.convert"),
        light=True,
    ),
)

_EACH_VARIANT = {stage.name for stage in PIPELINE if stage.each_variant}


@dataclass(frozen=True)
class Outcome:
    """What a run left: its artifacts by label, in order, and the thresholds that were broken."""

    artifacts: dict[str, Artifact]
    breaches: tuple[str, ...]

    @property
    def facts(self) -> Facts | None:
        """The report's facts, where the run came that far."""
        return self.artifacts["report"].facts if "report" in self.artifacts else None


@dataclass(frozen=True)
class Task:
    """One artifact to be made.

    Its stage and variant, the labels that it reads by stage name, its settings and its key.
    """

    stage: Stage
    variant: Variant | None
    inputs: dict[str, str]
    input_keys: dict[str, str]
    settings: Facts
    key: str

    @property
    def label(self) -> str:
        """What the artifact is called."""
        return _label(self.stage.name, self.variant)


def plan_tasks(preparation: Preparation, until: StageName) -> tuple[Task, ...]:
    """Every artifact up to `until`, in order, with its key.

    Keys follow from settings and the keys of inputs, so all are known before any work.
    """
    tasks: dict[str, Task] = {}
    for stage, variant in _walk(preparation, until):
        if stage.name == "report":
            inputs = {label: label for label in tasks}
        else:
            inputs = {
                name: _label(_made_by(preparation, stage, name), variant if name in _EACH_VARIANT else None)
                for name in stage.reads
            }
        keys = {name: tasks[label].key for name, label in inputs.items()}
        settings = stage.settings(preparation, variant)
        task = Task(stage, variant, inputs, keys, settings, artifact_key(keys, settings, code_digest(*stage.code)))
        tasks[task.label] = task
    return tuple(tasks.values())


def _made_by(preparation: Preparation, stage: Stage, name: StageName) -> StageName:
    """The stage that makes what `stage` reads as `name`.

    Where fine-tuning is switched off, the mixture to export is the upcycled one.
    """
    return (
        "upcycle" if name == "finetune" and stage.each_variant and preparation.loaded.recipe.finetune is None else name
    )


def run_pipeline(preparation: Preparation, workdir: Path, until: StageName, display: ProgressDisplay) -> Outcome | None:
    """Run every stage up to `until`.

    Finished artifacts are reused, and an unfinished one is begun again, or taken up where its stage can be. Under
    `accelerate launch` the processes but the first help where they can, and return none. A broken parity threshold does
    not stop the walk: the report shows it, and the caller fails the run.

    Raises:
        ArtifactError: the work directory is in use or not writable, the disk too small, or what an earlier run made was
            changed.
        UpcycleError, ExportError: a stage refused its input.
    """
    refuse_beyond_last_stage(preparation, until)
    tasks = plan_tasks(preparation, until)
    if not join_processes().is_main_process:
        _help(preparation, {task.label: task for task in tasks})
        return None
    with lock(workdir) as held:
        artifacts = {task.label: artifact for task in tasks if (artifact := find(workdir, task.label, task.key))}
        hashed: set[str] = set()  # labels of artifacts whose files this run has made or read
        delete_leftovers(workdir, STAGE_NAMES)
        _check_space(preparation, workdir, tasks, artifacts)
        _record(workdir, preparation, tasks, artifacts, "running")
        try:
            for task in tasks:
                if task.label in artifacts:
                    display.reuse(task.label)
                else:
                    artifacts[task.label] = _make(task, preparation, artifacts, hashed, workdir, held, display)
                    _record(workdir, preparation, tasks, artifacts, "running")
        except BaseException:
            with suppress(OSError):  # the disk may be what stopped it: that is to be told, not this
                _record(workdir, preparation, tasks, artifacts, "stopped")
            raise
        delete_leftovers(workdir, STAGE_NAMES, [task.label for task in tasks])
        tell(_NO_MORE_WORK)
        breaches = tuple(
            f"{task.variant}: {breach}"
            for task in tasks
            if task.stage.name == "parity"
            for breach in artifacts[task.label].facts["breaches"]
        )
        _record(workdir, preparation, tasks, artifacts, "breached" if breaches else "finished")
        return Outcome(artifacts, breaches)


def refuse_beyond_last_stage(preparation: Preparation, until: StageName) -> None:
    """Refuse a run that goes on beyond what there is for its target, before any work.

    Raises:
        RecipeError: the reason, and how far it can be run.
    """
    if preparation.last_stage is None:
        return
    last, reason = preparation.last_stage
    if STAGE_NAMES.index(until) > STAGE_NAMES.index(cast(StageName, last)):
        raise RecipeError(f"{preparation.loaded.path}: {reason}; run it with --until {last}")


def _walk(preparation: Preparation, until: StageName) -> Iterator[tuple[Stage, Variant | None]]:
    """Stages in the order of the table; the stages of one variant follow each other."""
    wanted = PIPELINE[: STAGE_NAMES.index(until) + 1]
    each = [stage for stage in wanted if stage.each_variant]
    yield from ((stage, None) for stage in wanted if not stage.each_variant and stage.name != "report")
    yield from ((stage, variant) for variant in preparation.loaded.recipe.variants for stage in each)
    yield from ((stage, None) for stage in wanted if stage.name == "report")


def _label(name: StageName, variant: Variant | None) -> str:
    return f"{name}-{variant}" if variant else name


def _make(
    task: Task,
    preparation: Preparation,
    artifacts: Mapping[str, Artifact],
    hashed: set[str],
    workdir: Path,
    held: int,
    display: ProgressDisplay,
) -> Artifact:
    inputs = {name: artifacts[label] for name, label in task.inputs.items()}
    progress = display.stage(task.label)
    _check_inputs(task, artifacts, hashed, progress)
    scratch = resume_directory(workdir, task.label, task.key)
    for damage in discard_damage(scratch, progress):
        display.note(damage)
    with build(workdir, task.label, task.key) as draft:
        directories = {name: artifact.directory for name, artifact in inputs.items()}
        facts = {name: artifact.facts for name, artifact in inputs.items()}
        if task.stage.all_processes:
            tell(_Work(task.label, directories, facts, draft.directory, scratch))
        job = Job(preparation, task.variant, directories, facts, task.input_keys, draft.directory, scratch, _quiet)
        try:
            made, cost = _run(task, job, held, progress)
        except Exception as error:
            if is_out_of_memory(error):
                raise ArtifactError(
                    f"{task.label}: out of memory; what is finished is kept, and the same command goes on from there; "
                    "close other programs, or take a smaller model, data.block_size or finetune.batch_size"
                ) from error
            if not isinstance(error, MendableError) and (refusal := find_os_error(error)) is not None:
                raise ArtifactError(describe_os_error(refusal, draft.directory)) from error
            raise
        facts_and_cost = {**made, COST: asdict(cost)}
        artifact = draft.seal(
            inputs=task.input_keys,
            settings=task.settings,
            facts=facts_and_cost,
            versions=versions(),
            seed=preparation.loaded.recipe.seed,
            progress=progress,
        )
    shutil.rmtree(scratch, ignore_errors=True)
    hashed.add(task.label)
    display.finish(task.label)
    return artifact


def _check_inputs(task: Task, artifacts: Mapping[str, Artifact], hashed: set[str], progress: Progress) -> None:
    """Check the files that a stage is about to read, of artifacts that an earlier run made, each once a run.

    Raises:
        ArtifactError: a file is not what it was when it was sealed.
    """
    for label in task.inputs.values():
        if label not in hashed:
            check_files(artifacts[label], progress, _SMALL_BYTES if task.stage.light else None)
            if not task.stage.light:
                hashed.add(label)


def _run(task: Task, job: Job, held: int, progress: Progress) -> tuple[Facts, StageCost]:
    """A stage's facts, and what they cost."""
    began = time.monotonic()
    if task.stage.light or (task.stage.all_processes and have_group()):
        made, peak = _do((task.stage.run, job), progress), peak_resident_bytes()
    else:
        measured = run_apart(_do, (task.stage.run, job), task.label, held, progress)
        made, peak = measured.found, measured.peak_resident_bytes
    return made, StageCost(time.monotonic() - began, peak, job.preparation.memory_bytes.get(task.label))


def _quiet(*_: object) -> None:
    """Progress that nobody watches."""


def _do(work: tuple[StageFunction, Job], progress: Progress) -> Facts:
    function, job = work
    return function(replace(job, progress=progress))


@dataclass(frozen=True)
class _Work:
    """What the first process tells the others to help with; the empty label ends it."""

    label: str
    directories: dict[str, Path]
    facts: dict[str, Facts]
    output: Path
    scratch: Path


_NO_MORE_WORK = _Work("", {}, {}, Path(), Path())


def _help(preparation: Preparation, tasks: Mapping[str, Task]) -> None:
    """Do what the first process says, until it has no more work."""
    while (work := tell(cast("_Work | None", None))) != _NO_MORE_WORK:
        task = tasks[work.label]
        task.stage.run(
            Job(
                preparation,
                task.variant,
                work.directories,
                work.facts,
                task.input_keys,
                work.output,
                work.scratch,
                _quiet,
            )
        )


def _check_space(
    preparation: Preparation, workdir: Path, tasks: Sequence[Task], artifacts: Mapping[str, Artifact]
) -> None:
    """Refuse a run whose missing artifacts cannot fit on the disk.

    What a killed run left to go on from is there already.
    """
    missing = {task.label for task in tasks if task.label not in artifacts}
    needed = sum(size for label, size in preparation.artifact_bytes.items() if label in missing)
    for task in tasks:
        if task.label == "finetune" and task.label in missing:
            left = resume_directory(workdir, task.label, task.key).rglob("*")
            needed += max(0, preparation.scratch_bytes - sum(path.stat().st_size for path in left if path.is_file()))
    check_space(workdir, needed)


def _record(
    workdir: Path, preparation: Preparation, tasks: Sequence[Task], artifacts: Mapping[str, Artifact], status: Status
) -> None:
    made = {task.label: artifacts[task.label].directory.name for task in tasks if task.label in artifacts}
    loaded = preparation.loaded
    write_run(workdir, RunState(loaded.name, str(loaded.path.absolute()), status, made))
