"""Small texts that tests of data make, and what is read of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.data import texts as texts_module
from dense2moe.upcycle.data.config import DataConfig, DataSource, TextData
from dense2moe.upcycle.data.documents import DocumentPiece
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.errors import UpcycleError

BOS, EOS = 0, 1  # of the tiny tokenizer


def quiet(what: str, done: int, total: int) -> None:
    pass


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        call(*arguments)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def text_data(**fields: Any) -> TextData:
    return TextData(kind="text", **fields)


def write(directory: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    return directory


def sentences(num: int, start: int = 0) -> list[str]:
    """Documents that differ in almost every word."""
    digests = [hashlib.sha256(f"{number}".encode()).hexdigest() for number in range(start, start + num)]
    return [" ".join(digest[i : i + 7] for i in range(0, 49, 7)) for digest in digests]


@dataclass(frozen=True)
class Read:
    """All documents of each domain, a tuple for each split, and the facts."""

    domains: dict[str, dict[Split, tuple[str, ...]]]
    facts: dict[str, str]


def read_texts(source: DataSource, base: Path) -> Read:
    found = texts_module.read_texts(source, base)
    whole: dict[str, dict[Split, tuple[str, ...]]] = {}
    for name, documents in found.domains.items():
        whole[name] = {split: tuple(join_pieces(stream())) for split, stream in documents.items()}
        assert {split: sum(map(len, texts)) for split, texts in whole[name].items()} == found.num_chars[name]
    return Read(whole, found.facts)


def join_pieces(pieces: Iterator[DocumentPiece]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        assert piece.first == (text == "")
        text += piece.text
        if piece.last:
            yield text
            text = ""
    assert text == ""


def digest_texts(documents: Mapping[Split, Sequence[str]]) -> str:
    return hashlib.sha256(
        "".join(f"{split}\0{text}\0" for split in SPLITS for text in documents[split]).encode()
    ).hexdigest()


def settings(source: TextData, **fields: Any) -> DataConfig:
    return DataConfig(source=source, **{"block_size": 16} | fields)


def raw_ids(directory: Path, text: str) -> list[int]:
    """Tokens by the `tokenizers` library, without marks."""
    return (
        PreTrainedTokenizerFast.from_pretrained(directory).backend_tokenizer.encode(text, add_special_tokens=False).ids
    )
