"""Documents divided into splits, so that no held-out text is trained on.

1. A whole document falls into one split, by the SHA-256 of its name, so all texts of one name stay together.
2. A paragraph (text between blank lines) of at least `_MIN_SHARED_CHARS` characters that occurs anywhere in the test
   split is cut out of validation and train, and one that occurs in validation is cut out of train. Documents quote each
   other and share licence headers; rule 1 alone would leak them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_MIN_SHARED_CHARS = 40


@dataclass(frozen=True)
class Document:
    """One text, its domain, and its name, which decides the split."""

    name: str
    domain: str
    text: str


def divide(documents: Iterable[Document]) -> dict[Split, tuple[Document, ...]]:
    """The documents of each split, by name and domain.

    Paragraphs that are held out are cut from those that are not; what has nothing left is left out.
    """
    by_split: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in sorted(documents, key=lambda each: (each.name, each.domain)):
        by_split[split_of(document.name)].append(document)
    held_out: set[str] = set()
    for split in ("test", "validation", "train"):
        by_split[split] = [d for d in (without(d, held_out) for d in by_split[split]) if d.text.strip()]
        if split != "train":
            held_out |= {key for d in by_split[split] for key in map(paragraph_key, paragraphs(d.text)) if key}
    return {split: tuple(found) for split, found in by_split.items()}


def digest_documents(documents: Mapping[Split, Iterable[Document]]) -> str:
    """SHA-256 of all text in order, with its splits, names and domains."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for each in documents[split]:
            digest.update(f"{split}\0{each.name}\0{each.domain}\0{each.text}\0".encode())
    return digest.hexdigest()


def split_of(
    name: str, held_out: Sequence[Split] = ("test", "validation"), share: int = 50, out_of: int = 1000
) -> Split:
    """The split of a name or text, by its SHA-256.

    Of `out_of` remainders the first `share` are the first split of `held_out`, the next `share` the second.
    """
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % out_of
    place = number // share
    return held_out[place] if place < len(held_out) else "train"


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text."""
    return re.split(r"\n[ \t]*\n", text)


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same text.

    The words, without white space and comment signs; empty where too short to matter.
    """
    key = " ".join(paragraph.replace("#", " ").split()).casefold()
    return key if len(key) >= _MIN_SHARED_CHARS else ""


def without(document: Document, held_out: set[str]) -> Document:
    """The document without paragraphs whose keys are in `held_out`."""
    kept = [paragraph for paragraph in paragraphs(document.text) if paragraph_key(paragraph) not in held_out]
    return replace(document, text="\n\n".join(kept))
