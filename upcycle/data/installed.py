"""The `installed` data set: text of installed Python packages.

Documentation and source that a machine already has, in domains that a model has perhaps never seen: C++ headers,
Cython, read-me files. Which files belong to a package is what its installer recorded, so other packages change nothing;
other versions give another text, so users record `InstalledTexts.versions` and `InstalledTexts.digest`. Nothing is run,
imported or copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dense2moe.upcycle.data.config import InstalledData, InstalledPart
from dense2moe.upcycle.data.held_out import SPLITS, Document, Split, digest_documents, divide
from dense2moe.upcycle.errors import UpcycleError

_MAX_BYTES = 400_000  # what is larger is a table, or generated


@dataclass(frozen=True)
class InstalledTexts:
    """The whole data set: documents by split, packages' versions, the text's SHA-256."""

    documents: dict[Split, tuple[Document, ...]]
    versions: dict[str, str]
    digest: str


def read_installed(source: InstalledData) -> InstalledTexts:
    """Read the files that the settings name.

    A file is a document, and whole files are held out.

    Raises:
        UpcycleError: as `find_versions` and `find_installed`, or a domain has no document for a split.
    """
    versions = find_versions(source)
    documents = divide(document for name in source.domains for document in _read_domain(source, name))
    for name in source.domains:
        for split in SPLITS:
            if all(each.domain != name for each in documents[split]):
                raise UpcycleError(
                    f"{installed_place(name)}: no document falls into the {split} split; name more files or packages"
                )
    return InstalledTexts(documents, versions, digest_documents(documents))


def installed_place(name: str) -> str:
    """Where in a recipe one domain's part is, as messages name it."""
    return f"data.source.domains.{name}"


def find_versions(source: InstalledData) -> dict[str, str]:
    """The version of each package that the settings name.

    Raises:
        UpcycleError: one is not installed.
    """
    found = {}
    for name, part in source.domains.items():
        for package in part.packages:
            try:
                found[package] = distribution(package).version
            except PackageNotFoundError as error:
                raise UpcycleError(
                    f"{installed_place(name)}.packages: '{package}' is not installed; install it (pip install "
                    f"'{package}'), or name another"
                ) from error
    return found


def find_installed(part: InstalledPart, where: str) -> dict[str, Path]:
    """The files of a part, by their recorded names, in order.

    Raises:
        UpcycleError: a pattern matches no file.
    """
    recorded = {
        str(file): Path(str(file.locate()))
        for package in part.packages
        for file in distribution(package).files or ()
        if ".." not in file.parts
    }
    for pattern in part.files:
        if not any(fnmatchcase(name, pattern) for name in recorded):
            raise UpcycleError(
                f"{where}.files: '{pattern}' matches no file that {', '.join(part.packages)} recorded; give a pattern "
                "such as 'numpy/*.py', whose * also stands for /"
            )
    return {
        name: path
        for name, path in sorted(recorded.items())
        if any(fnmatchcase(name, pattern) for pattern in part.files)
    }


def _read_domain(source: InstalledData, domain: str) -> Iterator[Document]:
    """The files of a domain in UTF-8 that are no tables."""
    for name, path in find_installed(source.domains[domain], installed_place(domain)).items():
        try:
            if path.stat().st_size <= _MAX_BYTES:
                yield Document(name, domain, path.read_text(encoding="utf-8").strip() + "\n")
        except (OSError, UnicodeDecodeError):  # removed by hand, or of another encoding
            continue
