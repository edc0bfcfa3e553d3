"""The dense checkpoint: found or fetched, its files linked, its values checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dense2moe.convert.artifact.known import digest_known, find_claimed
from dense2moe.convert.locations import SOURCES
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.recipe.records import LocalSource, Source
from dense2moe.convert.report.facts import FineTunedFacts, SourceFacts
from dense2moe.upcycle.checkpoints.adapter import is_adapter
from dense2moe.upcycle.checkpoints.reader import Checkpoint, check_values
from dense2moe.upcycle.errors import UpcycleError, one_line_errors


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """The dense checkpoint's content and place.

    A path that the recipe gives relative stays so: links to its files are relative as well, so a folder that holds
    recipe, checkpoint and work directory can be moved, and its artifacts are known again.
    """
    recipe = preparation.recipe
    settings: Facts = {
        "directory": _name_directory(recipe.source, preparation.checkpoint),
        "files": dict(preparation.source_files),
    }
    if preparation.sources:
        settings[SOURCES] = {
            name: {"directory": _name_directory(recipe.sources[name], found.checkpoint), "files": dict(found.files)}
            for name, found in preparation.sources.items()
        }
    return settings


def _name_directory(source: Source, checkpoint: Checkpoint) -> str:
    if isinstance(source, LocalSource) and not os.path.isabs(os.path.expanduser(source.path)):
        return source.path
    return str(checkpoint.directory)


def run_stage(run: StageRun) -> SourceFacts:
    """Links to the dense checkpoint's files, all values read once.

    Every value that something is made of is finite. They are relative: work directory and checkpoint can be moved
    together, or be seen at another place from a container.
    """
    checkpoint, sources = run.preparation.checkpoint, run.preparation.sources
    _check_and_link(run, checkpoint, run.preparation.source_files, run.output)
    for name, found in sources.items():
        _check_and_link(run, found.checkpoint, found.files, run.output / SOURCES / name)
    return SourceFacts(
        origin=run.preparation.origin,
        architecture=(checkpoint.config.architectures or ["?"])[0],
        num_parameters=checkpoint.num_parameters,
        num_bytes=checkpoint.num_bytes,
        dtype=", ".join(sorted({entry.dtype for entry in checkpoint.entries.values()})),
        sources=[
            FineTunedFacts(
                name=name,
                origin=found.origin,
                hub=found.hub,
                kind="adapter" if is_adapter(found.checkpoint.directory) else "checkpoint",
                remarks=list(found.remarks),
            )
            for name, found in sources.items()
        ],
    )


def _check_and_link(run: StageRun, checkpoint: Checkpoint, files: Mapping[str, str], output: Path) -> None:
    for number, _ in enumerate(check_values(checkpoint, run.preparation.plan.dropped), 1):
        run.progress("checking values", number, len(checkpoint.entries))
    for name, planned in files.items():
        _check_digest(checkpoint.directory / name, planned)
        link = output / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath((checkpoint.directory / name).resolve(), link.parent.resolve()))


def _check_digest(file: Path, planned: str) -> None:
    """Refuse a file whose digest differs from the key's.

    In the hub's cache, only its name was asked until now.
    """
    with one_line_errors(file, "cannot be read", "mend its mode or its disk, or get it again"):
        found = digest_known(file)
    if found == planned:
        return
    if find_claimed(file) == planned:
        raise UpcycleError(
            f"{file}: SHA-256 {found[:12]}...; must be {planned[:12]}..., as the hub named it; delete "
            f"{file.resolve()}, and a run fetches it again"
        )
    raise UpcycleError(f"{file}: was changed while it was read; run again")
