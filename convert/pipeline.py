"""The pipeline: one table of stages, and the walk over it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert import stages
from convert.artifact import Artifact, artifact_key, build, check_space, code_digest, find, lock
from convert.progress import ProgressDisplay
from convert.stages import Facts, Job, Preparation, StageFunction
from export.config import Variant

RUN_NAME = "run.json"
StageName = Literal["source", "data", "upcycle", "finetune", "quantize", "onnx", "parity", "report"]


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline. A stage that runs for each variant reads the same variant of the stages that do too."""

    name: StageName
    reads: tuple[StageName, ...]
    settings: Callable[[Preparation, Variant | None], Facts]
    run: StageFunction
    code: tuple[str, ...]
    each_variant: bool = False


PIPELINE: tuple[Stage, ...] = (
    Stage("source", (), stages.source_settings, stages.run_source, ("upcycle",)),
    Stage("data", ("source",), stages.data_settings, stages.run_data, ("upcycle",)),
    Stage("upcycle", ("source",), stages.upcycle_settings, stages.run_upcycle, ("upcycle",)),
    Stage("finetune", ("source", "data", "upcycle"), stages.finetune_settings, stages.run_finetune, ("upcycle",)),
    Stage("quantize", ("finetune",), stages.quantize_settings, stages.run_quantize, ("upcycle", "export"), each_variant=True),
    Stage("onnx", ("quantize",), stages.onnx_settings, stages.run_onnx, ("upcycle", "export"), each_variant=True),
    Stage(
        "parity", ("data", "finetune", "quantize", "onnx"), stages.parity_settings, stages.run_parity, ("upcycle", "export"), each_variant=True
    ),
    Stage(
        "report", ("source", "data", "upcycle", "finetune", "quantize", "onnx", "parity"), stages.report_settings, stages.run_report,
        ("upcycle", "export", "convert"),
    ),
)  # fmt: skip

STAGE_NAMES: tuple[StageName, ...] = tuple(stage.name for stage in PIPELINE)
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


def run_pipeline(preparation: Preparation, workdir: Path, until: StageName, display: ProgressDisplay) -> Outcome:
    """Run every stage up to `until`; finished artifacts are reused, and an unfinished one is begun again.

    A broken parity threshold does not stop the walk: the report shows it, and the caller fails the run.

    Raises:
        ArtifactError: the work directory is in use or not writable, or the disk too small.
        UpcycleError, ExportError: a stage refused its input.
    """
    with lock(workdir):
        artifacts: dict[str, Artifact] = {}
        _check_space(preparation, workdir, until)
        _record(workdir, preparation, artifacts, "running")
        try:
            for stage, variant in _walk(preparation, until):
                label = _label(stage.name, variant)
                artifacts[label] = _make(stage, variant, preparation, artifacts, workdir, display)
                _record(workdir, preparation, artifacts, "running")
        except BaseException:
            _record(workdir, preparation, artifacts, "stopped")
            raise
        breaches = tuple(
            f"{label.removeprefix('parity-')}: {breach}"
            for label, artifact in artifacts.items()
            if label.startswith("parity-")
            for breach in artifact.facts["breaches"]
        )
        _record(workdir, preparation, artifacts, "breached" if breaches else "finished")
        return Outcome(artifacts, breaches)


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
    stage: Stage, variant: Variant | None, preparation: Preparation, artifacts: dict[str, Artifact], workdir: Path, display: ProgressDisplay
) -> Artifact:
    label = _label(stage.name, variant)
    if stage.name == "report":
        inputs = dict(artifacts)
    else:
        inputs = {name: artifacts[_label(name, variant if name in _EACH_VARIANT else None)] for name in stage.reads}
    keys = {name: artifact.key for name, artifact in inputs.items()}
    settings = stage.settings(preparation, variant)
    key = artifact_key(keys, settings, code_digest(*stage.code))
    if artifact := find(workdir, label, key):
        display.reuse(label)
        return artifact
    progress = display.stage(label)
    with build(workdir, label, key) as draft:
        job = Job(
            preparation, variant, {name: a.directory for name, a in inputs.items()}, {name: a.facts for name, a in inputs.items()}, keys,
            draft.directory, progress,
        )  # fmt: skip
        facts = stage.run(job)
        seed = preparation.loaded.recipe.seed
        artifact = draft.seal(inputs=keys, settings=settings, facts=facts, versions=stages.versions(), seed=seed, progress=progress)
    display.finish(label)
    return artifact


def _check_space(preparation: Preparation, workdir: Path, until: StageName) -> None:
    """Refuse a run whose missing artifacts cannot fit; the last gibibyte is for everything else on the disk."""
    wanted = {_label(stage.name, variant) for stage, variant in _walk(preparation, until)}
    present = {path.name.rsplit("-", 1)[0] for path in workdir.iterdir() if path.is_dir() and not path.name.endswith(".partial")}
    needed = sum(size for label, size in preparation.artifact_bytes.items() if label in wanted and label not in present)
    # While training, two more copies of the mixture lie on the disk: the best checkpoint and the latest.
    if "finetune" in wanted and "finetune" not in present:
        needed += 2 * preparation.artifact_bytes["finetune"]
    check_space(workdir, needed)


def _record(workdir: Path, preparation: Preparation, artifacts: dict[str, Artifact], status: str) -> None:
    """Write the run's state beside its artifacts, whole or not at all."""
    state: dict[str, Any] = {
        "name": preparation.loaded.name,
        "recipe": str(preparation.loaded.path.absolute()),
        "status": status,
        "artifacts": {label: artifact.directory.name for label, artifact in artifacts.items()},
    }
    fresh = workdir / f"{RUN_NAME}.partial"
    fresh.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, workdir / RUN_NAME)
