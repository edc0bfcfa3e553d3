"""Where commands read packages, and where they write."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.run_state import RUN_NAME, read_run

PATH = click.Path(path_type=Path, readable=False)
"""A path that a command is given; what may not be read is refused where it is read, in one line."""


def check_output(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        ArtifactError: its folder is not there, or may not be written in.
    """
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise ArtifactError(f"{path}: {folder} is no directory; make it, or give another {option}")
    if path.is_dir():
        raise ArtifactError(f"{path}: is a directory; {option} must name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ArtifactError(f"{path}: no permission to write it; give another {option}")


def find_package(directory: Path, variant: str | None) -> Path:
    """The package in a directory, or a variant's in a work directory.

    Where a run has several and none is named, stderr tells which one is taken, and how to choose.

    Raises:
        ArtifactError: it is the work directory of a run without such a package.
    """
    if not (directory / RUN_NAME).is_file():
        if variant is not None:
            raise ArtifactError(
                f"{directory}: is not the work directory of a run, which --variant chooses from; leave it out"
            )
        return directory
    packages = read_run(directory).packages
    if not packages:
        raise ArtifactError(f"{directory}: the run has made no ONNX package yet; finish it with `dense2moe run`")
    if variant is not None and variant not in packages:
        raise ArtifactError(f"{directory}: no variant '{variant}'; it has {', '.join(packages)}")
    first = next(iter(packages))
    if variant is None and len(packages) > 1:
        click.echo(f"{directory}: variant {first} of {', '.join(packages)}; --variant chooses another", err=True)
    return directory / packages[variant or first]
