"""A run from Python: the same stages and artifacts as `dense2moe run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dense2moe.convert.checking import prepare
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.report.names import HTML_NAME
from dense2moe.convert.stage_names import StageName
from dense2moe.convert.walk import run_pipeline
from dense2moe.upcycle.training.processes import leave_processes


@dataclass(frozen=True)
class Run:
    """A run's results in its work directory.

    Attributes:
        workdir: the work directory.
        artifacts: each artifact's directory by its label, such as "upcycle" or "onnx-int8".
        breaches: every broken limit of parity, a line each.
        facts: what report.json holds; None if the run was not to come that far.
    """

    workdir: Path
    artifacts: dict[str, Path]
    breaches: tuple[str, ...]
    facts: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        """Whether every limit of parity was met."""
        return not self.breaches

    @property
    def report(self) -> Path | None:
        """The page of the run; None if the run ended earlier."""
        return self.artifacts["report"] / HTML_NAME if "report" in self.artifacts else None


def run(
    recipe: str | Path,
    workdir: str | Path | None = None,
    *,
    until: StageName = "report",
    only: str | None = None,
    show_progress: bool = False,
) -> Run:
    """Run a recipe: upcycle, fine-tune, quantize, export, check parity, report.

    As `dense2moe run`: finished artifacts are reused, a killed run resumes, and a broken limit of parity raises nothing
    but is in the result. Stages run in processes of their own, so memory is free when each has ended. Under `accelerate
    launch` every process calls it; all but the first help with training, and get a result without artifacts.

    Args:
        recipe: the YAML file.
        workdir: directory of the artifacts; `runs/NAME` below the current directory if not given.
        until: last stage to run.
        only: with until "branch", the domain whose branch is trained; all of them if not given.
        show_progress: whether to show a line for each stage on stderr.

    Returns:
        The artifacts, the broken limits and the facts of the report.

    Raises:
        MendableError: the recipe, a file that it names, or the disk; several mistakes of a recipe are a line each.

    Example:
        result = run("recipe.yaml", workdir="work")
        assert result.passed, result.breaches
        print(result.facts["variants"]["float32"]["onnx"]["package_bytes"], result.report)
        package = Package(result.artifacts["onnx-float32"])
    """
    preparation = prepare(load_recipe(Path(recipe)), lambda *_: None)
    directory = Path("runs") / preparation.loaded.name if workdir is None else Path(workdir)
    with ProgressDisplay(Console(stderr=True) if show_progress else Console(quiet=True)) as display:
        outcome = run_pipeline(preparation, directory, until, display, only=only)
    leave_processes()
    if outcome is None:
        return Run(directory, {}, (), None)
    artifacts = {label: artifact.directory for label, artifact in outcome.artifacts.items()}
    return Run(directory, artifacts, outcome.breaches, outcome.facts)
