"""Texts of every kind of source, as streams of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never, cast

from dense2moe.upcycle.data.config import DomainsData, HubData, InstalledData, PythonDocsData, TextData, TextSource
from dense2moe.upcycle.data.documents import DocumentPiece, Stream, read_documents
from dense2moe.upcycle.data.files import domain_place, resolve_files, text_files
from dense2moe.upcycle.data.held_out import SPLITS, Document, Split, split_of
from dense2moe.upcycle.data.installed import read_installed
from dense2moe.upcycle.data.python_docs import DOMAINS, read_python_docs
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.hub import tell_hub_errors


@dataclass(frozen=True)
class Texts:
    """Documents of each domain, a stream for each split.

    num_chars: characters of each domain and split. facts: where the text comes from, in words and digests.
    """

    domains: dict[str, dict[Split, Stream]]
    num_chars: dict[str, dict[Split, int]]
    facts: dict[str, str]


def read_texts(source: TextSource, base: Path) -> Texts:
    """Read the documents; relative paths of files start at `base`.

    Raises:
        UpcycleError: a file or data set is missing, not UTF-8 or empty.
    """
    streams, facts = _open_streams(source, base)
    surveys = {name: _survey(documents) for name, documents in streams.items()}
    if not isinstance(source, PythonDocsData | InstalledData):  # which have digests of their own
        digests = {name: digest for name, (_, digest) in surveys.items()}
        facts |= (
            {f"digest of {name}": digest for name, digest in digests.items()}
            if isinstance(source, DomainsData)
            else {"digest": digests["text"]}
        )
    return Texts(streams, {name: num_chars for name, (num_chars, _) in surveys.items()}, facts)


def _open_streams(source: TextSource, base: Path) -> tuple[dict[str, dict[Split, Stream]], dict[str, str]]:
    match source:
        case PythonDocsData():
            docs = read_python_docs()
            facts = {"interpreter": f"CPython {docs.version}", "digest": docs.digest}
            return _stream_domains(docs.documents, DOMAINS), facts
        case InstalledData():
            found = read_installed(source)
            packages = ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items()))
            return _stream_domains(found.documents, source.domains), {"packages": packages, "digest": found.digest}
        case TextData():
            return {"text": open_files(source, base, "data.source")}, {}
        case HubData():
            return {"text": _open_hub(source, "data.source")}, {"data set": source.path}
        case DomainsData():
            resolve_files(source, base)
            return {
                name: open_files(part, base, domain_place(name))
                if isinstance(part, TextData)
                else _open_hub(part, domain_place(name))
                for name, part in source.domains.items()
            }, {}
        case _:
            assert_never(source)


def _stream_domains(
    documents: Mapping[Split, Iterable[Document]], domains: Iterable[str]
) -> dict[str, dict[Split, Stream]]:
    """Documents that are in memory, as streams of each domain and split."""
    texts = {
        domain: {split: [each.text for each in documents[split] if each.domain == domain] for split in SPLITS}
        for domain in domains
    }
    streams = {
        domain: {split: partial(map, DocumentPiece, of[split]) for split in SPLITS} for domain, of in texts.items()
    }
    return cast("dict[str, dict[Split, Stream]]", streams)


def _survey(documents: Mapping[Split, Stream]) -> tuple[dict[Split, int], str]:
    """Characters of each split, and the SHA-256 of all documents.

    The digest covers documents with their splits, in order.

    Each is read once.
    """
    digest, num_chars = hashlib.sha256(), {}
    for split in SPLITS:
        num_chars[split] = 0
        for piece in documents[split]():
            num_chars[split] += len(piece.text)
            digest.update(
                (f"{split}\0" if piece.first else "").encode() + piece.text.encode() + (b"\0" if piece.last else b"")
            )
    return num_chars, digest.hexdigest()


def open_files(source: TextData, base: Path, where: str) -> dict[Split, Stream]:
    """Documents of each split; a split without any is refused.

    Without `validation` or `test` files the hash of a document, of its first piece if it is long, decides which of the
    train files' it falls into.
    """
    files = text_files(source, base, where)
    # as Python reads line ends
    separator = source.separator and source.separator.replace("\r\n", "\n").replace("\r", "\n")
    held_out = cast("list[Split]", [split for split in ("test", "validation") if not getattr(source, split)])

    def read(split: Split) -> Iterator[DocumentPiece]:
        if split in held_out or split == "train":
            for file in files["train"]:
                belongs = False
                for piece in read_documents(file, separator):
                    belongs = split_of(piece.text.strip(), held_out) == split if piece.first else belongs
                    if belongs:
                        yield piece
        else:
            for file in files[split]:
                yield from read_documents(file, separator)

    for split in SPLITS:
        if next(read(split), None) is None:
            raise UpcycleError(
                f"{where}: no document falls into the {split} split; give `{split}:` files, or a `separator` that "
                "makes more documents"
            )
    return {split: partial(read, split) for split in SPLITS}


def _open_hub(source: HubData, place: str) -> dict[Split, Stream]:
    import datasets  # slow to import, and only this needs it

    where = f"{place}: data set '{source.path}'"
    documents: dict[Split, Stream] = {}
    for split in SPLITS:
        name = getattr(source, split)
        with tell_hub_errors(f"{where}, split '{name}'", "give text files of your own"):
            rows = datasets.load_dataset(source.path, source.name, revision=source.revision, split=name)
        if source.text_column not in rows.column_names:
            raise UpcycleError(
                f"{where}: no column '{source.text_column}'; it has {shorten(', '.join(rows.column_names))}"
            )
        documents[split] = partial(
            _read_rows, rows, source.text_column, f"{where}: column '{source.text_column}' of split '{name}'"
        )
        if next(documents[split](), None) is None:
            raise UpcycleError(f"{where}: split '{name}' has no text in column '{source.text_column}'")
    return documents


def _read_rows(rows: Any, column: str, where: str) -> Iterator[DocumentPiece]:
    """Documents of a data set on disk; rows without text are skipped."""
    for row in rows.select_columns([column]):
        if not isinstance(text := row[column], str | None):
            raise UpcycleError(f"{where} holds {type(text).__name__}; it must hold text")
        if text and text.strip():
            yield DocumentPiece(text)
