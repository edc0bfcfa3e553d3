"""Files that paths and globs of a recipe mean, split by split."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from dense2moe.upcycle.data.config import (
    ChatData,
    ConllData,
    DataSource,
    DomainsData,
    HubTableData,
    ImagesData,
    SentencesData,
    TableData,
    TasksData,
    TextData,
)
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.errors import UpcycleError


def domain_place(name: str) -> str:
    """Where a domain's source stands in a recipe, for messages."""
    return f"data.source.domains.{name}"


def task_place(name: str) -> str:
    """Where a task's source stands in a recipe, for messages."""
    return f"data.source.tasks.{name}"


FileSource = TextData | TableData | ConllData | SentencesData | ChatData


def text_sources(source: DataSource) -> dict[str, FileSource]:
    """Every source of text files, by its place in the recipe."""
    match source:
        case TextData() | TableData() | ConllData() | SentencesData() | ChatData():
            return {"data.source": source}
        case DomainsData():
            return {domain_place(name): part for name, part in source.domains.items() if isinstance(part, TextData)}
        case TasksData():
            tasks = source.tasks.items()
            return {task_place(name): part for name, part in tasks if not isinstance(part, HubTableData)}
        case _:
            return {}


def text_files(source: FileSource, base: Path, where: str = "data.source") -> dict[Split, list[Path]]:
    """Files of each split, globs resolved, in order.

    `where` names the source in an error.

    Raises:
        UpcycleError: a path or glob matches no file, or a held-out file is also trained on.
    """
    given: dict[Split, tuple[str, ...]] = {"train": source.train, "validation": source.validation, "test": source.test}
    files: dict[Split, list[Path]] = {}
    for split, patterns in given.items():
        files[split] = match_files(patterns, base, f"{where}.{split}")
    trained = {file.resolve() for file in files["train"]}
    for split in ("validation", "test"):
        if shared := next((file for file in files[split] if file.resolve() in trained), None):
            raise UpcycleError(
                f"{where}.{split}: {shared} is also a train file; held-out text must not be trained on; give each "
                "file one split"
            )
    return files


def resolve_files(source: DataSource, base: Path) -> dict[str, dict[Split, list[Path]]]:
    """Files of each split, for every source of text files.

    Keyed by the source's place in the recipe.

    Raises:
        UpcycleError: as `text_files`, or a file that one domain holds out is trained on in another.
    """
    files = {where: text_files(text, base, where) for where, text in text_sources(source).items()}
    if isinstance(source, ImagesData):
        files = {"data.source": image_files(source, base)}
    trained = {file.resolve(): where for where, splits in files.items() for file in splits["train"]}
    for where, splits in files.items():
        for split in ("validation", "test"):
            if shared := next((file for file in splits[split] if file.resolve() in trained), None):
                raise UpcycleError(
                    f"{where}.{split}: {shared} is also a file of {trained[shared.resolve()]}.train; held-out text "
                    "must not be trained on; "
                    "give each file one split"
                )
    return files


def image_files(source: ImagesData, base: Path, where: str = "data.source") -> dict[Split, list[Path]]:
    """Files below the folders of each split, sorted.

    Raises:
        UpcycleError: there is no such folder, or no folder of a label in it.
    """
    found: dict[Split, list[Path]] = {"train": [], "validation": [], "test": []}
    for split in found:
        if (name := getattr(source, split)) is None:
            continue
        folder = base / Path(name).expanduser()
        if not folder.is_dir():
            raise UpcycleError(
                f"{where}.{split}: '{name}' is no folder below {base}; give a folder of folders of images"
            )
        found[split] = sorted(file for file in folder.glob("*/*") if file.is_file() and not file.name.startswith("."))
        if not found[split]:
            raise UpcycleError(
                f"{where}.{split}: {folder} has no images in folders of their labels; must be {name}/LABEL/IMAGE"
            )
    return found


def find_files(pattern: str, base: Path) -> list[Path]:
    """The files that a path or glob below `base` means, sorted.

    `~` is the home, and a name that is there may hold brackets.

    Raises:
        UpcycleError: it begins with `~`, and there is no such home.
    """
    parts = Path(pattern).parts
    root, name = base, pattern
    if parts and parts[0].startswith("~"):
        try:
            root, name = Path(parts[0]).expanduser(), str(Path(*parts[1:]))
        except RuntimeError as error:
            raise UpcycleError(f"'{pattern}' names no home directory; give the path in full") from error
    if (root / name).is_file():
        return [root / name]
    return [
        root / found for found in sorted(glob.glob(name, root_dir=root, recursive=True)) if (root / found).is_file()
    ]


def match_files(patterns: Iterable[str], base: Path, where: str) -> list[Path]:
    """Files that paths and globs below `base` mean, each once, in order.

    `where` names them in an error.

    Raises:
        UpcycleError: a path or glob matches no file.
    """
    files: dict[Path, Path] = {}
    for number, pattern in enumerate(patterns):
        found = find_files(pattern, base)
        if not found:
            raise UpcycleError(
                f"{where}[{number}]: '{pattern}' matches no file below {base}; give a path or glob of UTF-8 text files"
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())
