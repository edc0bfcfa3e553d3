"""Blocks hold every token in order, whatever the tokenizer marks, the limit keeps or a piece cuts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from texts import (
    BOS,
    EOS,
    quiet,
    raw_ids,
    read_texts,
    refusal,
    sentences,
    settings,
    text_data,
    write,
)
from told import tells
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import TextData
from dense2moe.upcycle.data.documents import DocumentPiece
from dense2moe.upcycle.data.files import text_files
from dense2moe.upcycle.data.held_out import SPLITS
from dense2moe.upcycle.data.packing import choose_evenly, encode_documents

# Tokens and blocks


@pytest.fixture
def without_bos(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A directory with the tiny tokenizer, marking no start, as GPT-2's."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    return path.parent


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[TextData, Path]:
    documents = {"a": sentences(20), "v": sentences(9, start=100), "t": sentences(11, start=200)}
    write(tmp_path, **{name: "|".join(texts) for name, texts in documents.items()})
    return text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",), separator="|"), tmp_path


@pytest.mark.parametrize("marks_start", [True, False])
def test_blocks_hold_every_token_in_order(
    marks_start: bool, corpus: tuple[TextData, Path], dense_checkpoint: Path, without_bos: Path, tmp_path: Path
) -> None:
    source, base = corpus
    directory = dense_checkpoint if marks_start else without_bos
    facts = prepare_data(directory, tmp_path, settings(source), base, quiet)
    for split, documents in read_texts(source, base).domains["text"].items():
        # Llama's tokenizer opens each document with <s>; where none is set, </s> opens the stream and closes each
        # document.
        stream = [] if marks_start else [EOS]
        for document in documents:
            stream += [BOS, *raw_ids(directory, document)] if marks_start else [*raw_ids(directory, document), EOS]
        blocks = read_blocks(tmp_path, split)
        assert blocks.dtype == torch.int64
        assert blocks.shape == (len(stream) // 16, 16)
        assert blocks.flatten().tolist() == stream[: blocks.numel()]
        assert len(stream) - blocks.numel() < 16
        assert facts["num_tokens"][split] == blocks.numel()
        assert load_file(tmp_path / f"{split}.safetensors")["input_ids"].dtype == torch.int32
    assert facts["block_size"] == 16
    assert facts["digest"] == read_texts(source, base).facts["digest"]
    assert json.loads((tmp_path / "data.json").read_text()) == facts


def test_a_tokenizer_without_any_mark_gets_none(
    corpus: tuple[TextData, Path], without_bos: Path, tmp_path: Path
) -> None:
    path = without_bos / "tokenizer_config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ("bos_token", "eos_token")})
    )
    source, base = corpus
    prepare_data(without_bos, tmp_path, settings(source), base, quiet)
    stream = [
        number
        for document in read_texts(source, base).domains["text"]["train"]
        for number in raw_ids(without_bos, document)
    ]
    blocks = read_blocks(tmp_path, "train")
    assert blocks.flatten().tolist() == stream[: blocks.numel()]


@pytest.mark.parametrize(
    ("max_tokens", "num_blocks"),
    [(5 * 16, 5), (5 * 16 + 15, 5), (16, 1), (3, 1), (10**9, None), (None, None)],
)
def test_a_limit_keeps_blocks_from_the_whole_evenly(
    max_tokens: int | None,
    num_blocks: int | None,
    corpus: tuple[TextData, Path],
    dense_checkpoint: Path,
    tmp_path: Path,
) -> None:
    source, base = corpus
    for name, limit in (("all", None), ("some", max_tokens)):
        (tmp_path / name).mkdir()
        prepare_data(dense_checkpoint, tmp_path / name, settings(source, max_train_tokens=limit), base, quiet)
    everything, found = (read_blocks(tmp_path / name, "train").tolist() for name in ("all", "some"))
    assert len(found) == (num_blocks or len(everything))
    places = [everything.index(block) for block in found]
    steps = {later - earlier for earlier, later in pairwise(places)}
    assert not steps or max(steps) - min(steps) <= 1
    assert places[0] == 0
    assert len(places) == 1 or places[-1] == len(everything) - 1


@pytest.mark.parametrize(("field", "split"), [("max_validation_tokens", "validation"), ("max_test_tokens", "test")])
def test_each_split_has_a_limit_of_its_own(
    field: str, split: str, corpus: tuple[TextData, Path], dense_checkpoint: Path, tmp_path: Path
) -> None:
    source, base = corpus
    full = prepare_data(dense_checkpoint, tmp_path, settings(source), base, quiet)["num_tokens"]
    assert prepare_data(dense_checkpoint, tmp_path, settings(source, **{field: 32}), base, quiet)[
        "num_tokens"
    ] == full | {split: 32}


@pytest.mark.parametrize("num_blocks", [10_000, 30_000])
def test_no_block_is_taken_twice_from_a_large_set(num_blocks: int) -> None:
    for wanted in (num_blocks - 1, num_blocks - 2, num_blocks - 7, num_blocks // 2 + 1):
        assert len(choose_evenly(num_blocks, wanted).unique()) == wanted


def test_progress_counts_the_splits(corpus: tuple[TextData, Path], dense_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare_data(dense_checkpoint, tmp_path, settings(corpus[0]), corpus[1], lambda *report: seen.append(report))
    assert seen == [("tokenizing", done, 3) for done in range(4)]


@pytest.mark.parametrize("split", SPLITS)
def test_less_text_than_a_block_is_refused(
    split: str, corpus: tuple[TextData, Path], dense_checkpoint: Path, tmp_path: Path
) -> None:
    source, base = corpus
    short = source.model_copy(update={split: ("short.txt",)})
    write(base, short="two words")
    said = refusal(prepare_data, dense_checkpoint, tmp_path, settings(short, block_size=64), base, quiet)
    assert said == (
        f"data: the {split} split has fewer tokens than one block of 64; give more text or a smaller block_size"
    )


@pytest.mark.parametrize("content", [None, "{", "{}", '{"version": "1.0", "added_tokens": []}'])
def test_a_source_without_a_usable_tokenizer_is_refused(
    content: str | None, corpus: tuple[TextData, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (directory / "tokenizer.json").write_text(content)
    message = refusal(prepare_data, directory, tmp_path, settings(corpus[0]), corpus[1], quiet)
    if content is None:
        assert tells(message, f"{directory}: no tokenizer", "tokenizer.json")
    else:
        assert message.split(": ")[1].startswith("transformers cannot load the tokenizer (")
        assert message.endswith("); download the tokenizer's files again, or put the model's own tokenizer.json there")


def test_relative_paths_start_at_the_base_and_not_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a="text")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert text_files(text_data(train=("a.txt",)), tmp_path)["train"] == [tmp_path / "a.txt"]
    assert [
        os.path.samefile(file, tmp_path / "a.txt")
        for file in text_files(text_data(train=("a.txt",)), Path(".."))["train"]
    ] == [True]


# Long texts, in pieces


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense2moe.upcycle.data.documents._PIECE_CHARS", 64)


@pytest.mark.parametrize("separator", ["<|sep|>", "\n\n", None])
def test_documents_in_pieces_are_those_of_a_split_of_the_whole(
    separator: str | None, small_pieces: None, tmp_path: Path
) -> None:
    lines = [line for number, line in enumerate(sentences(80)) for line in (line, *[""] * (number % 3))]
    text = (
        "\n".join(lines)
        if separator != "<|sep|>"
        else "".join(f"{line}\n{separator if number % 5 == 0 else ''}" for number, line in enumerate(lines))
    )
    write(tmp_path, a=text, v="v", t="t")
    found = read_texts(
        text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",), separator=separator), tmp_path
    ).domains["text"]["train"]
    expected = [document.rstrip().lstrip("\n") for document in (text.split(separator) if separator else [text])]
    assert list(found) == [document for document in expected if document]


@pytest.mark.parametrize("marks_start", [True, False])
def test_the_tokens_of_a_document_in_pieces_are_those_of_the_whole(
    marks_start: bool, dense_checkpoint: Path, without_bos: Path, tmp_path: Path, small_pieces: None
) -> None:
    directory = dense_checkpoint if marks_start else without_bos
    documents = ["\n".join(sentences(40)), "short", "\n".join(sentences(30, 50))]
    write(tmp_path, a="|".join(documents), v="\n".join(sentences(9)), t="\n".join(sentences(9)))
    prepare_data(
        directory,
        tmp_path,
        settings(text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",), separator="|")),
        tmp_path,
        quiet,
    )
    stream = [] if marks_start else [EOS]
    for document in documents:
        stream += [BOS, *raw_ids(directory, document)] if marks_start else [*raw_ids(directory, document), EOS]
    blocks = read_blocks(tmp_path, "train")
    assert blocks.flatten().tolist() == stream[: blocks.numel()]
    assert len(stream) - blocks.numel() < 16


def test_a_limit_tokenizes_a_part_taken_evenly(
    dense_checkpoint: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.data.packing._WHOLE_CHARS", 1000)
    lines = [f"{number:05d} {line}" for number, line in enumerate(sentences(4000))]
    write(tmp_path, a="\n".join(lines), v="\n".join(sentences(9)), t="\n".join(sentences(9)))
    config = settings(text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",)), max_train_tokens=160 * 16)
    read = 0

    def encode(tokenizer: Any, pieces: Any) -> Any:
        def count() -> Iterator[DocumentPiece]:
            nonlocal read
            for piece in pieces:
                read += len(piece.text)
                yield piece

        return encode_documents(tokenizer, count())

    monkeypatch.setattr("dense2moe.upcycle.data.packing.encode_documents", encode)
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        prepare_data(dense_checkpoint, tmp_path / name, config, tmp_path, quiet)
        found.append(read_blocks(tmp_path / name, "train"))
    assert torch.equal(*found)
    assert len(found[0]) == 160
    assert read / 2 < sum(map(len, lines)) / 4
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense_checkpoint)
    text = "\n".join(lines)
    texts = [tokenizer.decode(block) for block in found[0]]
    # a block over a gap has the mark of a start in it
    places = [text.index(part) for part in texts if "<s>" not in part]
    assert len(places) > 100
    assert places == sorted(places)
    assert places[0] < 0.02 * len(text)
    assert places[-1] > 0.98 * len(text)
    assert max(later - earlier for earlier, later in pairwise(places)) < 0.05 * len(text)


def test_a_limit_that_the_first_part_does_not_fill_takes_more(
    dense_checkpoint: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.data.packing._WHOLE_CHARS", 1000)
    monkeypatch.setattr("dense2moe.upcycle.data.packing._CHARS_A_TOKEN", 0.1)
    write(tmp_path, a="\n".join(sentences(400)), v="\n".join(sentences(9)), t="\n".join(sentences(9)))
    config = settings(text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",)), max_train_tokens=100 * 16)
    prepare_data(dense_checkpoint, tmp_path, config, tmp_path, quiet)
    assert len(read_blocks(tmp_path, "train")) == 100


@pytest.mark.parametrize(
    "fields",
    [{"train": ()}, {"train": ("a",), "separator": ""}, {"train": ("a",), "seperator": "x"}, {"train": "a.txt"}],
)
def test_settings_of_another_form_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        text_data(**fields)
