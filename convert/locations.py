"""Where a recipe's checkpoints and texts are; hub models are fetched."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import LoadedRecipe, resolve_path
from dense2moe.convert.recipe.records import HUB_ID, HubSource, LocalSource
from dense2moe.convert.recipe.wording import Key
from dense2moe.upcycle.checkpoints.adapter import ADAPTER_STEM, is_adapter
from dense2moe.upcycle.checkpoints.companions import FOLDER_PATTERNS, HUB_IGNORED, find_companions
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.headers import INDEX_NAME, SINGLE_NAME, read_index
from dense2moe.upcycle.checkpoints.reader import ADAPTER_CONFIG_NAME, Checkpoint, read_config, refuse_adapter
from dense2moe.upcycle.data.config import ImagesData
from dense2moe.upcycle.data.files import find_files, text_sources
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


def find_data_base(loaded: LoadedRecipe) -> Path:
    """The folder to which the data's file names are relative."""
    source = loaded.recipe.data.source
    if isinstance(source, ImagesData):
        beside = loaded.path.absolute().parent
        return beside if (beside / Path(source.train).expanduser()).is_dir() else Path.cwd()
    sources = text_sources(source)
    return find_text_base(loaded, next(iter(sources.values())).train[0]) if sources else Path.cwd()


def find_text_base(loaded: LoadedRecipe, first: str) -> Path:
    """The folder to which names of text files are relative.

    Beside the recipe, or else the current one, as for the source.

    The first file given decides which.
    """
    beside = loaded.path.absolute().parent
    return beside if find_files(first, beside) else Path.cwd()


def find_router_base(loaded: LoadedRecipe) -> Path:
    """The folder to which routers' text files are relative."""
    files = [file for domain in loaded.recipe.upcycle.router.domains for file in domain.files]
    return find_text_base(loaded, files[0]) if files else Path.cwd()


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
        return Path(snapshot_download(hub, revision=directory.name, allow_patterns=[*names, *FOLDER_PATTERNS]))
