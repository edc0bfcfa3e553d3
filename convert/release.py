"""A release: a package, its model card, report and digests."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dense2moe.convert.artifact.disk import check_space, describe_os_error
from dense2moe.convert.artifact.manifest import Artifact
from dense2moe.convert.artifact.verification import verify
from dense2moe.convert.digests import DIGESTS_NAME, write_digests
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.report.names import CARD_NAME, CARDS_NAME, HTML_NAME
from dense2moe.upcycle.durable import sync_tree


def gather_package(package: Artifact, report: Artifact, variant: str, output: Path) -> list[str]:
    """Copy a package for release into the new directory `output`.

    With its card as `README.md`, and the report. Returns the names of its files. The artifacts stay as they are. Every
    file is checked against its manifest first, and `output` is there whole or not at all, with the digests of its files
    in `SHA256SUMS`. Links become files.

    Raises:
        ArtifactError: `output` is there already, a file is not as its manifest says, the report has no card, or the
            disk is full.
    """
    if os.path.lexists(output):
        raise ArtifactError(f"{output}: exists already; give a new directory")
    card = report.directory / CARDS_NAME / variant / CARD_NAME
    if not card.is_file():
        raise ArtifactError(
            f"{report.directory}: has no model card for {variant}; run the recipe again, which writes the report anew"
        )
    for artifact in (package, report):
        for mismatch in verify(artifact.directory):
            raise ArtifactError(f"{artifact.directory}: {mismatch}; move the directory away, and run the recipe again")
    sources = {name: package.directory / name for name in package.manifest["files"]}
    sources |= {CARD_NAME: card, HTML_NAME: report.directory / HTML_NAME}
    check_space(output, sum(source.stat().st_size for source in sources.values()), "DIRECTORY")
    known = {
        name: record["sha256"]
        for name, record in package.manifest["files"].items()
        if name not in (CARD_NAME, HTML_NAME)
    }
    try:
        with _fresh_directory(output) as fresh:
            for name, source in sources.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, fresh / name)
            write_digests(fresh, known)
            sync_tree(fresh)
            fresh.rename(output)
    except OSError as error:
        raise ArtifactError(describe_os_error(error, output, "DIRECTORY")) from error
    return sorted([*sources, DIGESTS_NAME])


@contextmanager
def _fresh_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output`.

    Which goes away with the parents made for it unless it is renamed in the block.
    """
    missing = [parent for parent in output.absolute().parents if not parent.exists()]
    fresh = output.with_name(f".{output.name[:100]}-{secrets.token_hex(8)}.partial")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty is not ours alone
            for parent in missing:
                parent.rmdir()
        raise
