"""The state of a run, in a file beside its artifacts."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dense2moe.convert.errors import ArtifactError
from dense2moe.upcycle.errors import shorten

RUN_NAME = "run.json"

Status = Literal["running", "stopped", "breached", "finished"]


@dataclass(frozen=True)
class RunState:
    """A run's progress: name, recipe, status, and artifacts' directories by label."""

    name: str
    recipe: str
    status: str
    artifacts: dict[str, str]

    @property
    def packages(self) -> dict[str, str]:
        """The directories of its ONNX packages, by variant."""
        return {
            label.removeprefix("onnx-"): name for label, name in self.artifacts.items() if label.startswith("onnx-")
        }


def write_run(workdir: Path, state: RunState) -> None:
    """Write the state, whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    fresh = workdir / f"{RUN_NAME}.partial"
    try:
        fresh.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, workdir / RUN_NAME)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def read_run(directory: Path) -> RunState:
    """The state of the run in a work directory.

    Raises:
        ArtifactError: there is none, or it is malformed.
    """
    path = directory / RUN_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: no {RUN_NAME}; it must be the work directory of a run, such as runs/quickstart"
        )
    try:
        state: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({shorten(error)}); run the recipe again") from error
    match state:
        case {"name": str(name), "status": str(status), "recipe": str(recipe), "artifacts": {**artifacts}} if all(
            map(_is_name, artifacts.values())
        ):
            return RunState(name, recipe, status, cast(dict[str, str], artifacts))
    raise ArtifactError(
        f"{path}: not the state of a run, which has name, status, recipe, and artifacts with the names of their "
        "directories; run the recipe again"
    )


def _is_name(value: object) -> bool:
    """Whether it is a plain file name, and no path.

    A path could leave the folder.
    """
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and value.isprintable()
