"""The dense checkpoint: found or fetched, its files linked, its values checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path

from dense2moe.convert.artifact.known import digest_known, find_claimed
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.recipe.loading import LoadedRecipe, resolve_path
from dense2moe.convert.recipe.records import HUB_ID, HubSource, LocalSource, Source
from dense2moe.convert.recipe.wording import Key
from dense2moe.convert.report.facts import FineTunedFacts, SourceFacts
from dense2moe.upcycle.checkpoints.adapter import ADAPTER_STEM, is_adapter
from dense2moe.upcycle.checkpoints.companions import HUB_IGNORED, TEMPLATES_PATTERN, find_companions
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.headers import INDEX_NAME, SINGLE_NAME, read_index
from dense2moe.upcycle.checkpoints.reader import (
    ADAPTER_CONFIG_NAME,
    Checkpoint,
    check_values,
    read_config,
    refuse_adapter,
)
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.hub import tell_hub_errors
from dense2moe.upcycle.models.table import find_family

SOURCES = "sources"
"""The folder, in the artifact, of the checkpoints fine-tuned from the dense one, by name."""


def locate_source(loaded: LoadedRecipe, name: str | None = None) -> tuple[Path, str]:
    """A checkpoint's directory, and what the recipe calls it.

    The dense one, or the one of `sources` by this name. A hub model is downloaded if need be.

    Raises:
        RecipeError: it is not there, or cannot be fetched.
    """
    key = ("source",) if name is None else (SOURCES, name)
    match loaded.recipe.source if name is None else loaded.recipe.sources[name]:
        case LocalSource(path=path):
            return _resolve_source(path, loaded, key).resolve(), path
        case HubSource(hub=hub, revision=revision):
            return _download(hub, revision, loaded, key), f"{hub}@{revision}"


def name_files(checkpoint: Checkpoint) -> list[str]:
    """Names of a checkpoint's files that are used.

    Its config, what belongs to it, its weights.
    """
    directory = checkpoint.directory
    weights = {file.name for file in checkpoint.files if file.parent == directory}  # an adapter's base lies elsewhere
    indexes = {file.name for file in directory.glob("*.safetensors.index.json")}
    config = ADAPTER_CONFIG_NAME if is_adapter(directory) else CONFIG_NAME
    return [config, *find_companions(directory), *sorted(weights | indexes)]


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


def _resolve_source(path: str, loaded: LoadedRecipe, key: Key) -> Path:
    """The directory of a local source.

    A missing directory may be meant as an id of the hub.
    """
    try:
        return resolve_path(path, loaded.path, loaded.name_place(*key))
    except RecipeError as error:
        if not re.fullmatch(HUB_ID, path):
            raise
        raise RecipeError(
            f"{error}, or write `{key[-1]}: {{hub: {path}}}` for a model of the Hugging Face hub"
        ) from error


def _download(hub: str, revision: str, loaded: LoadedRecipe, key: Key) -> Path:
    """A model of the hub, fetched.

    What belongs to it, and then, of the same commit, the weights that its index names.
    """
    from huggingface_hub import snapshot_download  # only a hub source needs it

    what = f"{loaded.name_place(*key, 'hub')}: '{hub}' at revision '{revision}'"
    instead = "give a directory as path"
    with tell_hub_errors(what, instead, RecipeError):
        directory = Path(snapshot_download(hub, revision=revision, ignore_patterns=list(HUB_IGNORED)))
    if key[0] == SOURCES and (directory / ADAPTER_CONFIG_NAME).is_file():
        names = [f"{ADAPTER_STEM}*.safetensors"]
    else:
        refuse_adapter(directory)
        config = read_config(directory)
        # before gigabytes are fetched for nothing
        find_family(config.model_type, config.architectures, str(directory / CONFIG_NAME), config)
        weights = read_index(directory) if (directory / INDEX_NAME).is_file() else ()
        names = [escape(name) for name in (SINGLE_NAME, *weights)]
    with tell_hub_errors(f"{what} (its weights)", instead, RecipeError):
        return Path(snapshot_download(hub, revision=directory.name, allow_patterns=[*names, TEMPLATES_PATTERN]))
