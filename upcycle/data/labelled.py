"""Labelled examples: read, divided into splits, encoded, and written.

1. Every row of every split is read, and refused by its place if something is wrong with it.
2. Splits that are not given are made by the SHA-256 of a text, so that equal texts stay together: 10 % each.
3. A training row whose text is also held out is left out, and counted: the test split is never trained on.
4. Labels get numbers: the checkpoint's own where its head has all of them, else by name, `O` first among tags.
5. Texts are tokenized, cut at `block_size` tokens and counted where they were, and padded to the longest of the split.
   A word's tag stands at its first token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.class_heads import find_padding, find_task_of, has_head, list_labels
from dense2moe.upcycle.checkpoints.processor import load_processor
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.checkpoints.words import EncodedText, encode_text, join_words
from dense2moe.upcycle.data.config import (
    ConllData,
    DataConfig,
    DigitsData,
    HubTableData,
    ImagesData,
    LabelledSource,
    TableData,
)
from dense2moe.upcycle.data.files import text_files
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.images import (
    LabelledImage,
    count_image_tokens,
    process,
    read_hub_images,
    read_image_splits,
)
from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.data.rows import (
    Label,
    LabelledRow,
    list_rows,
    open_hub_table,
    read_conll,
    read_hub_rows,
    read_table,
)
from dense2moe.upcycle.data.splitting import Labelled, Row, divide_rows
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, PIXELS, TYPES, UNLABELLED
from dense2moe.upcycle.tasks.head import ONE, OUTSIDE, SEVERAL, VALUE, LabelHead, LabelledTask

_LEAST_ROWS = 2  # of a split
_VALUE_LABELS = ("value",)  # of a head that predicts a number, unless the checkpoint's has a name of its own


@dataclass(frozen=True)
class Vocabulary:
    """Labels in the order of their numbers, and their task.

    problem: transformers' `problem_type`; None where words have tags.
    """

    task: LabelledTask
    labels: tuple[str, ...]
    problem: str | None

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each label."""
        return {label: number for number, label in enumerate(self.labels)}


def prepare_labelled(
    source: Path, output: Path, config: DataConfig, data: LabelledSource, base: Path, progress: Progress
) -> dict[str, Any]:
    """Write `train`, `validation` and `test` as safetensors; returns the facts.

    Texts as `input_ids`, `attention_mask`, and `token_type_ids` of tokenizers that have some, int32 [N, S]; images as
    `pixel_values` float32 [N, channels, height, width]; `labels` int32 [N], [N, S] of words' tags, float32 [N, labels]
    where several hold, [N] of values; `domains` int32 [N].

    Raises:
        UpcycleError: a row is wrong, a split is too small, or the checkpoint has no tokenizer or image processor.
    """
    found = read_labelled(data, base)
    model_config = read_config(source)
    vocabulary = find_vocabulary(found.rows, model_config)
    head = LabelHead(vocabulary.labels, vocabulary.problem)
    rows = {split: _limit(found.rows[split], getattr(config, f"max_{split}_examples")) for split in SPLITS}
    encode = _choose_encoder(source, config, vocabulary)
    facts: dict[str, Any] = {
        "block_size": 0,
        "num_tokens": {},
        "num_examples": {split: len(rows[split]) for split in SPLITS},
        "domains": ["images" if vocabulary.task == "image-classification" else "text"],
        "digest": _digest(found.rows),
        "task": vocabulary.task,
        "labels": list(vocabulary.labels),
        "problem": vocabulary.problem,
        "new_head": not has_head(model_config, vocabulary.task, head),
        "label_counts": {split: _count_labels(rows[split], vocabulary) for split in SPLITS},
        "num_shared_with_held_out": found.num_shared,
        "num_cut": {},
    }
    for number, split in enumerate(SPLITS):
        progress("encoding", number, len(SPLITS))
        encoded = encode(rows[split])
        tensors = {**encoded.tensors, "domains": torch.zeros(len(rows[split]), dtype=torch.int32)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / f"{split}.safetensors")
        facts["num_tokens"][split], facts["num_cut"][split] = encoded.num_tokens, encoded.num_cut
        facts["block_size"] = max(facts["block_size"], encoded.longest)
        if encoded.image_tokens:
            facts["image_tokens"] = encoded.image_tokens
    progress("encoding", len(SPLITS), len(SPLITS))
    return facts


def check_labelled(source: Path, config: DataConfig, data: LabelledSource, base: Path) -> Vocabulary | None:
    """Refuse what `prepare_labelled` would, as far as that is known at once.

    Files are read whole, and one row of each split is encoded. Data sets of the hub are not opened: None.

    Raises:
        UpcycleError: as `prepare_labelled`.
    """
    if isinstance(data, HubTableData):
        load_processor(source) if data.image else load_tokenizer(source)
        return None
    found = read_labelled(data, base)
    vocabulary = find_vocabulary(found.rows, read_config(source))
    encode = _choose_encoder(source, config, vocabulary)
    for split in SPLITS:
        encode(found.rows[split][:1])
    return vocabulary


def read_labelled(data: LabelledSource, base: Path) -> Labelled[Any]:
    """All rows of a source, divided into splits.

    Raises:
        UpcycleError: a row is wrong, or a split has fewer than two.
    """
    given = dict(_read_splits(data, base))
    rows = divide_rows(given)
    for split in SPLITS:
        if len(rows.rows[split]) < _LEAST_ROWS:
            count = len(rows.rows[split])
            own = "" if split in given else f", or a `{split}:` of its own"
            without = "; what the test split has is left out of it" if split == "validation" and split in given else ""
            raise UpcycleError(
                f"data.source: the {split} split has {count} example{'s' * (count != 1)}{without}; "
                f"must have {_LEAST_ROWS} or more; give more rows{own}"
            )
    return rows


def _read_splits(data: LabelledSource, base: Path) -> Iterator[tuple[Split, list[Any]]]:
    """The rows of each split that is given."""
    match data:
        case TableData() | ConllData():
            files = text_files(data, base)
            for split in SPLITS:
                if files[split]:
                    parts = (
                        read_table(file, data) if isinstance(data, TableData) else read_conll(file, data)
                        for file in files[split]
                    )
                    yield split, list_rows(parts)
        case HubTableData():
            for split in SPLITS:
                if (name := getattr(data, split)) is not None:
                    rows = open_hub_table(data, name)
                    yield split, list(read_hub_images(rows, data) if data.image else read_hub_rows(rows, data, name))
        case ImagesData() | DigitsData():
            yield from read_image_splits(data, base)
        case _:
            assert_never(data)


def _limit(rows: Sequence[Row], most: int | None) -> list[Row]:
    return [rows[place] for place in choose_evenly(len(rows), most).tolist()]


def _digest(rows: Mapping[Split, Sequence[Row]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for row in rows[split]:
            digest.update(f"{split}\0{row.key}\0{json.dumps(row.answer)}\0".encode())
    return digest.hexdigest()


# Labels


def find_vocabulary(rows: Mapping[Split, Sequence[Any]], config: PreTrainedConfig) -> Vocabulary:
    """The task of labelled rows, and the order of their labels.

    Raises:
        UpcycleError: rows have labels of different kinds, or there is only one label.
    """
    every = [row for split in SPLITS for row in rows[split]]
    if isinstance(every[0], LabelledImage):
        return _name_classes("image-classification", {row.label for row in every}, config)
    if every[0].words:
        tags = {tag for row in every for tag in row.tags}
        _check_several(tags, "tag")
        return Vocabulary("token-classification", _order("token-classification", tags, config, _tag_order), None)
    first = every[0]
    for row in every:
        if type(row.label) is not type(first.label):
            raise UpcycleError(
                f"{row.where}: its label is {row.label!r}, and the first row's is {first.label!r}; all must be names, "
                "lists of names, or numbers (with `problem: value` whole ones too)"
            )
    if isinstance(first.label, float):
        own = list_labels(config) if find_task_of(config) == "text-classification" else ()
        return Vocabulary("text-classification", own if len(own) == 1 else _VALUE_LABELS, VALUE)
    if isinstance(first.label, tuple):
        names = {name for row in every for name in row.label}
        if not names:
            raise UpcycleError("data.source: every list of labels is empty; at least one must have a label")
        labels = _order("text-classification", names, config, _class_order)
        return Vocabulary("text-classification", labels, SEVERAL)
    return _name_classes("text-classification", {row.label for row in every}, config)


def _name_classes(task: LabelledTask, names: set[str], config: PreTrainedConfig) -> Vocabulary:
    _check_several(names, "label")
    return Vocabulary(task, _order(task, names, config, _class_order), ONE)


def _check_several(names: set[str], what: str) -> None:
    if len(names) < 2:
        raise UpcycleError(f"data.source: every {what} is '{next(iter(names))}'; must be two or more {what}s")


def _order(
    task: LabelledTask, names: Iterable[str], config: PreTrainedConfig, key: Callable[[str], Any]
) -> tuple[str, ...]:
    """Labels in order: the checkpoint's where its head has all of them."""
    wanted = set(names)
    if find_task_of(config) == task and wanted <= set(own := list_labels(config)):
        return own
    return tuple(sorted(wanted, key=key))


def _class_order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, before names."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _tag_order(tag: str) -> tuple[bool, str, str]:
    """`O` first, then types, and B- before I-."""
    prefix, _, kind = tag.partition("-")
    return (tag != OUTSIDE, kind, prefix)


def _count_labels(rows: Sequence[Any], vocabulary: Vocabulary) -> dict[str, int]:
    """How often each label is right; nothing of values."""
    if vocabulary.problem == VALUE:
        return {}
    found = Counter(name for row in rows for name in _names_of(row.answer))
    return {label: found[label] for label in vocabulary.labels}


def _names_of(answer: Label) -> tuple[str, ...]:
    return answer if isinstance(answer, tuple) else (str(answer),)


# Encoding


@dataclass(frozen=True)
class Encoded:
    """Tensors of a split, its real tokens, and cut examples.

    longest: tokens of the longest. image_tokens: positions of an image, 0 of texts.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int
    num_cut: int
    longest: int
    image_tokens: int = 0


def _choose_encoder(source: Path, config: DataConfig, vocabulary: Vocabulary) -> Callable[[Sequence[Any]], Encoded]:
    if vocabulary.task == "image-classification":
        model_config = read_config(source)
        processor = load_processor(source)
        return partial(_encode_images, processor, count_image_tokens(model_config), vocabulary)
    filling = find_padding(read_config(source))
    return partial(_encode_texts, load_tokenizer(source), config.block_size, filling, vocabulary)


def _encode_images(processor: Any, num_tokens: int, vocabulary: Vocabulary, rows: Sequence[LabelledImage]) -> Encoded:
    labels = torch.tensor([vocabulary.numbers[row.label] for row in rows], dtype=torch.int32)
    pixels = process(processor, rows)
    return Encoded({PIXELS: pixels, LABELS: labels}, num_tokens * len(rows), 0, num_tokens, num_tokens)


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    filling: int,
    vocabulary: Vocabulary,
    rows: Sequence[LabelledRow],
) -> Encoded:
    texts = [encode_row(tokenizer, most_tokens, row) for row in rows]
    length = max(len(text.ids) for text in texts)
    tensors = {
        IDS: _pad([text.ids for text in texts], length, filling),
        MASK: _pad([[1] * len(text.ids) for text in texts], length, 0),
    }
    if texts[0].types:
        tensors[TYPES] = _pad([text.types for text in texts], length, 0)
    tensors[LABELS] = _number(rows, texts, vocabulary, length)
    return Encoded(tensors, int(tensors[MASK].sum()), sum(text.is_cut for text in texts), length)


def encode_row(tokenizer: PreTrainedTokenizerBase, most_tokens: int, row: LabelledRow) -> EncodedText:
    """A labelled text's tokens.

    Raises:
        UpcycleError: the text has no tokens.
    """
    text = encode_text(tokenizer, row.text, most_tokens, row.pair, join_words(row.words)[1])
    if not text.ids or (row.words and all(first is None for first in text.firsts)):
        raise UpcycleError(f"{row.where}: the tokenizer makes no tokens of its text; leave the row out")
    return text


def _pad(rows: Sequence[Sequence[int]], length: int, filling: int) -> torch.Tensor:
    return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows], dtype=torch.int32)


def _number(
    rows: Sequence[LabelledRow], texts: Sequence[EncodedText], vocabulary: Vocabulary, length: int
) -> torch.Tensor:
    """The labels of texts as numbers."""
    numbers = vocabulary.numbers
    if vocabulary.task == "token-classification":
        found = torch.full((len(rows), length), UNLABELLED, dtype=torch.int32)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            for tag, first in zip(row.tags, text.firsts, strict=True):
                if first is not None:
                    found[place, first] = numbers[tag]
        return found
    if vocabulary.problem == VALUE:
        return torch.tensor([[row.label] for row in rows], dtype=torch.float32)
    if vocabulary.problem == SEVERAL:
        return torch.tensor([[label in _names_of(row.answer) for label in numbers] for row in rows]).float()
    return torch.tensor([numbers[str(row.label)] for row in rows], dtype=torch.int32)
