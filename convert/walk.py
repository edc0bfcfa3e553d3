"""The walk over a pipeline: reuses finished artifacts, makes the others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import cast

from dense2moe.convert.artifact.disk import check_space, describe_os_error
from dense2moe.convert.artifact.locking import lock
from dense2moe.convert.artifact.manifest import Artifact
from dense2moe.convert.artifact.sealing import build, delete_leftovers, find, find_manifests, resume_directory
from dense2moe.convert.artifact.verification import check_files
from dense2moe.convert.errors import ArtifactError, RecipeError
from dense2moe.convert.machine import peak_resident_bytes, versions
from dense2moe.convert.pipeline import PIPELINE, Stage
from dense2moe.convert.planning import PlannedArtifact, choose_item, plan_artifacts
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.report.costs import COST
from dense2moe.convert.report.facts import StageCost
from dense2moe.convert.run_state import RunState, Status, write_run
from dense2moe.convert.worker import run_apart
from dense2moe.upcycle.durable import discard_damage
from dense2moe.upcycle.errors import MendableError, find_os_error, is_out_of_memory
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.processes import explain_single_process, have_group, join_processes, tell

_SMALL_BYTES = 32_000_000
"""Of an input's file, the most that a light stage reads: configs, a training history; weights it leaves alone."""
BREACHES = "breaches"
"""The key, among a stage's facts, of thresholds that it found broken."""


@dataclass(frozen=True)
class RunOutcome:
    """A run's result: artifacts by label, in order, and broken limits."""

    artifacts: dict[str, Artifact]
    breaches: tuple[str, ...]

    @property
    def facts(self) -> Facts | None:
        """The report's facts, if the run came that far."""
        return self.artifacts["report"].facts if "report" in self.artifacts else None


def run_pipeline(
    preparation: Preparation,
    workdir: Path,
    until: str,
    display: ProgressDisplay,
    pipeline: tuple[Stage, ...] = PIPELINE,
    only: str | None = None,
) -> RunOutcome | None:
    """Run every stage up to `until`, of which `only` names one item.

    Finished artifacts are reused, and an unfinished one is begun again, or taken up where its stage can be. Under
    `accelerate launch` the processes but the first help where they can, and return none. A broken threshold does not
    stop the walk: the report shows it, and the caller fails the run.

    Raises:
        RecipeError: the recipe's pipeline does not come to `until`, or `only` is no item of it.
        ArtifactError: the work directory is in use or not writable, the disk too small, or what an earlier run made was
            changed.
        UpcycleError, ExportError: a stage refused its input.
    """
    names = [stage.name for stage in pipeline]
    refuse_beyond_last_stage(preparation, until, names)
    refuse_only(preparation, pipeline[names.index(until)], only)
    planned = plan_artifacts(preparation, until, pipeline)
    if only is not None:
        planned = choose_item(planned, only)
    if not join_processes().is_main_process:
        _help(preparation, {each.label: each for each in planned})
        return None
    with lock(workdir) as held:
        walk = Walk(preparation, workdir, planned, display, held)
        delete_leftovers(workdir, names)
        check_space(workdir, walk.missing_bytes())
        for line in (*preparation.remarks, *walk.find_launch_remarks()):
            display.note(line)
        if outdated := walk.find_outdated():
            display.note(
                f"{workdir}: made by another version of dense2moe, kept as they are and made anew: "
                f"{', '.join(outdated)}"
            )
        walk.record("running")
        try:
            for each in planned:
                if each.label in walk.artifacts:
                    display.reuse(each.label)
                else:
                    walk.artifacts[each.label] = walk.make(each)
                    walk.record("running")
        except BaseException:
            with suppress(OSError):  # the disk may be what stopped it: that is to be told, not this
                walk.record("stopped")
            raise
        delete_leftovers(workdir, names, [each.label for each in planned])
        tell(_NO_MORE_WORK)
        breaches = tuple(walk.breaches())
        walk.record("breached" if breaches else "finished")
        return RunOutcome(walk.artifacts, breaches)


def refuse_beyond_last_stage(preparation: Preparation, until: str, names: Sequence[str]) -> None:
    """Refuse a run beyond its target's last stage, before any work.

    Raises:
        RecipeError: the reason, and how far it can be run.
    """
    if preparation.last_stage is None:
        return
    last, reason = preparation.last_stage
    if names.index(until) > names.index(last):
        raise RecipeError(f"{preparation.loaded.path}: {reason}; run it with --until {last}")


def refuse_only(preparation: Preparation, last: Stage, only: str | None) -> None:
    """Refuse branches that are not there, or one where all are needed.

    Raises:
        RecipeError: what there is.
    """
    path, is_branch = preparation.loaded.path, last.each == "domain"
    domains = preparation.items["domain"] if is_branch else ()
    if is_branch and not domains:
        raise RecipeError(f"{path}: has no branch; give `branch: {{}}`, or another --until")
    if only is None:
        return
    if not is_branch:
        raise RecipeError(f"--only {only}: needs --until branch, since every stage after it reads all branches")
    if only not in domains:
        raise RecipeError(f"--only {only}: no such domain in {path}; must be one of {', '.join(domains)}")


class Walk:
    """One walk over a pipeline in a locked work directory.

    `artifacts` are the finished ones by label, `hashed` the labels of those whose files this run has made or read.
    """

    def __init__(
        self,
        preparation: Preparation,
        workdir: Path,
        planned: Sequence[PlannedArtifact],
        display: ProgressDisplay,
        held: int,
    ) -> None:
        self.preparation, self.workdir, self.planned = preparation, workdir, planned
        self.display, self.held = display, held
        found = {each.label: find(workdir, each.label, each.key) for each in planned}
        self.artifacts = {label: artifact for label, artifact in found.items() if artifact is not None}
        self.hashed: set[str] = set()

    def missing_bytes(self) -> int:
        """Bytes still to be written.

        What a killed run left to resume from is there already, and one stage's scratch is deleted before the next's.
        """
        artifacts, most = 0, 0
        for each in self.planned:
            if each.label in self.artifacts:
                continue
            artifacts += self.preparation.artifact_bytes.get(each.label, 0)
            if scratch := self.preparation.scratch_bytes.get(each.label, 0):
                left = resume_directory(self.workdir, each.label, each.key).rglob("*")
                most = max(most, scratch - sum(path.stat().st_size for path in left if path.is_file()))
        return artifacts + most

    def find_launch_remarks(self) -> list[str]:
        """Remarks on this run's processes, where stages could share work."""
        shared = any(each.stage.all_processes for each in self.planned if each.label not in self.artifacts)
        remark = explain_single_process() if shared else None
        return [] if remark is None else [remark]

    def find_outdated(self) -> list[str]:
        """Labels of missing artifacts that other code made.

        Settings and inputs were the same.
        """
        outdated, keys = [], set[str]()
        for each in self.planned:
            settings = json.loads(json.dumps(each.settings))
            for manifest in find_manifests(self.workdir, each.label) if each.label not in self.artifacts else ():
                other = set(manifest["inputs"].values()) - set(each.input_keys.values())
                if manifest["settings"] == settings and other <= keys:
                    keys.add(manifest["key"])
                    outdated.append(each.label)
        return list(dict.fromkeys(outdated))

    def make(self, planned: PlannedArtifact) -> Artifact:
        """Run one stage and seal what it made."""
        inputs = {name: self.artifacts[label] for name, label in planned.inputs.items()}
        progress = self.display.stage(planned.label)
        self.check_inputs(planned, progress)
        scratch = resume_directory(self.workdir, planned.label, planned.key)
        for damage in discard_damage(scratch, progress):
            self.display.note(damage)
        with build(self.workdir, planned.label, planned.key) as draft:
            directories = {name: artifact.directory for name, artifact in inputs.items()}
            facts = {name: artifact.facts for name, artifact in inputs.items()}
            if planned.stage.all_processes:
                tell(_Work(planned.label, directories, facts, draft.directory, scratch))
            run = StageRun(
                self.preparation,
                planned.item,
                directories,
                facts,
                planned.input_keys,
                draft.directory,
                scratch,
                _quiet,
            )
            try:
                with self.preparation.loaded.telling_lines():
                    made, cost = self.run(planned, run, progress)
            except Exception as error:
                if (refusal := _describe_refusal(error, planned.label, draft.directory)) is not None:
                    raise ArtifactError(refusal) from error
                raise
            artifact = draft.seal(
                inputs=planned.input_keys,
                settings=planned.settings,
                facts={**made, COST: asdict(cost)},
                versions=versions(),
                seed=self.preparation.loaded.recipe.seed,
                progress=progress,
            )
        shutil.rmtree(scratch, ignore_errors=True)
        self.hashed.add(planned.label)
        self.display.finish(planned.label)
        return artifact

    def check_inputs(self, planned: PlannedArtifact, progress: Progress) -> None:
        """Check a stage's input files, once a run.

        Files of artifacts that an earlier run made.

        Raises:
            ArtifactError: a file is not what it was when it was sealed.
        """
        for label in planned.inputs.values():
            if label not in self.hashed:
                check_files(self.artifacts[label], progress, _SMALL_BYTES if planned.stage.light else None)
                if not planned.stage.light:
                    self.hashed.add(label)

    def run(self, planned: PlannedArtifact, run: StageRun, progress: Progress) -> tuple[Facts, StageCost]:
        """A stage's facts and costs."""
        began = time.monotonic()
        if planned.stage.light or (planned.stage.all_processes and have_group()):
            made, peak = _do((planned.stage.run, run), progress), peak_resident_bytes()
        else:
            measured = run_apart(_do, (planned.stage.run, run), planned.label, self.held, progress)
            made, peak = measured.found, measured.peak_resident_bytes
        return made, StageCost(time.monotonic() - began, peak, self.preparation.memory_bytes.get(planned.label))

    def breaches(self) -> Iterator[str]:
        """Broken limits that stages found, each after its item."""
        for each in self.planned:
            for breach in self.artifacts[each.label].facts.get(BREACHES, ()):
                yield f"{each.item}: {breach}" if each.item else breach

    def record(self, status: Status) -> None:
        """Write the run's state beside its artifacts."""
        made = {
            each.label: self.artifacts[each.label].directory.name
            for each in self.planned
            if each.label in self.artifacts
        }
        loaded = self.preparation.loaded
        write_run(self.workdir, RunState(loaded.name, str(loaded.path.absolute()), status, made))


def _describe_refusal(error: Exception, label: str, directory: Path) -> str | None:
    """A stage's lack of memory or disk, in one line, or None."""
    if is_out_of_memory(error):
        return (
            f"{label}: out of memory; what is finished is kept; run the same command to resume; close other "
            "programs, or take a smaller model, data.block_size or finetune.batch_size"
        )
    if not isinstance(error, MendableError) and (refusal := find_os_error(error)) is not None:
        return describe_os_error(refusal, directory)
    return None


def _quiet(*_: object) -> None:
    """Progress that nobody sees."""


def _do(work: tuple[Callable[[StageRun], object], StageRun], progress: Progress) -> Facts:
    """A stage's facts as JSON has them.

    Records are objects, keys are text.
    """
    function, run = work
    found = function(replace(run, progress=progress))
    if is_dataclass(found) and not isinstance(found, type):
        found = asdict(found)
    facts: Facts = json.loads(json.dumps(found))
    return facts


@dataclass(frozen=True)
class _Work:
    """Work that the first process shares out; an empty label ends it."""

    label: str
    directories: dict[str, Path]
    facts: dict[str, Facts]
    output: Path
    scratch: Path


_NO_MORE_WORK = _Work("", {}, {}, Path(), Path())


def _help(preparation: Preparation, planned: Mapping[str, PlannedArtifact]) -> None:
    """Do what the first process says, until its work is done."""
    while (work := tell(cast("_Work | None", None))) != _NO_MORE_WORK:
        each = planned[work.label]
        each.stage.run(
            StageRun(
                preparation,
                each.item,
                work.directories,
                work.facts,
                each.input_keys,
                work.output,
                work.scratch,
                _quiet,
            )
        )
