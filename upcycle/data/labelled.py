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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, assert_never

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.class_heads import find_padding, has_head
from dense2moe.upcycle.checkpoints.processor import load_processor
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.checkpoints.words import EncodedText, encode_text, join_words
from dense2moe.upcycle.data.config import (
    Columns,
    ConllData,
    DataConfig,
    DigitsData,
    HubSentencesData,
    HubSplits,
    HubTableData,
    ImagesData,
    OneTask,
    SentencesData,
    TableData,
    reads_images,
)
from dense2moe.upcycle.data.encoded import Encoded, pad
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
from dense2moe.upcycle.data.question_examples import JUDGED, QuestionEncoder, write_questions
from dense2moe.upcycle.data.rows import (
    LabelledRow,
    open_hub_table,
    read_conll,
    read_hub_rows,
    read_hub_values,
    read_rows,
    read_table,
)
from dense2moe.upcycle.data.sentences import encode_sentences, read_sentences
from dense2moe.upcycle.data.splitting import Labelled, Row, divide_rows
from dense2moe.upcycle.data.vocabulary import PLACE, Vocabulary, count_labels, find_vocabulary, names_of
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import IDS, LABELS, MASK, PIXELS, TYPES, UNLABELLED
from dense2moe.upcycle.tasks.head import ANSWERING, OF_WORDS, SEVERAL, VALUE, VECTORS

_LEAST_ROWS = 2  # of a split


def prepare_labelled(
    source: Path, output: Path, config: DataConfig, data: OneTask, base: Path, progress: Progress
) -> dict[str, Any]:
    """Write `train`, `validation` and `test` as safetensors; returns the facts.

    Texts as `input_ids`, `attention_mask`, and `token_type_ids` of tokenizers that have some, int32 [N, S]; images as
    `pixel_values` float32 [N, channels, height, width]; `labels` int32 [N], [N, S] of words' tags, float32 [N, labels]
    where several hold, [N] of values; `domains` int32 [N]. Texts that belong together: see `encode_sentences`;
    questions: see `QuestionEncoder`.

    Raises:
        UpcycleError: a row is wrong, a split is too small, or the checkpoint has no tokenizer or image processor.
    """
    found = read_labelled(data, base)
    model_config = read_config(source)
    vocabulary = find_vocabulary(found.rows, model_config)
    rows = limit_rows(found.rows, config)
    encode = choose_encoder(source, config, vocabulary)
    facts: dict[str, Any] = {
        "block_size": 0,
        "num_tokens": {},
        "num_examples": {split: len(rows[split]) for split in SPLITS},
        "domains": ["images" if vocabulary.task == "image-classification" else "text"],
        "digest": digest_rows(found.rows),
        "task": vocabulary.task,
        "labels": list(vocabulary.labels),
        "problem": vocabulary.problem,
        "new_head": not has_head(model_config, vocabulary.task, vocabulary.head),
        "label_counts": {split: count_labels(rows[split], vocabulary) for split in SPLITS},
        "num_shared_with_held_out": found.num_shared,
        "num_cut": {},
    }
    for number, split in enumerate(SPLITS):
        progress("encoding", number, len(SPLITS))
        encoded = encode(rows[split])
        tensors = {**encoded.tensors, "domains": torch.zeros(len(encoded), dtype=torch.int32)}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if split != "train" or name not in JUDGED}
        save_file(kept, output / f"{split}.safetensors")
        facts["num_tokens"][split], facts["num_cut"][split] = encoded.num_tokens, encoded.num_cut
        facts["block_size"] = max(facts["block_size"], encoded.longest)
        if encoded.image_tokens:
            facts["image_tokens"] = encoded.image_tokens
        if vocabulary.task == ANSWERING:
            facts.setdefault("num_windows", {})[split] = len(encoded)
            facts["longest_answer"] = max(facts.get("longest_answer", 0), encoded.longest_answer)
    if vocabulary.task == ANSWERING:
        write_questions(rows, facts["longest_answer"], output)
    progress("encoding", len(SPLITS), len(SPLITS))
    return facts


def check_labelled(source: Path, config: DataConfig, data: OneTask, base: Path) -> Vocabulary | None:
    """Refuse what `prepare_labelled` would, as far as that is known at once.

    Files are read whole, and one row of each split is encoded. Data sets of the hub are not opened: None.

    Raises:
        UpcycleError: as `prepare_labelled`.
    """
    if isinstance(data, HubSplits):
        load_processor(source) if reads_images(data) else load_tokenizer(source)
        return None
    found = read_labelled(data, base)
    vocabulary = find_vocabulary(found.rows, read_config(source))
    encode = choose_encoder(source, config, vocabulary)
    for split in SPLITS:
        encode(found.rows[split][:1])
    return vocabulary


def read_labelled(data: OneTask, base: Path, where: str = PLACE) -> Labelled[Any]:
    """All rows of a source, divided into splits.

    `where` names the source in an error.

    Raises:
        UpcycleError: a row is wrong, or a split has fewer than two.
    """
    given = dict(_read_splits(data, base, where))
    grouped = isinstance(data, Columns) and data.question is not None
    rows = divide_rows(given, attrgetter("context" if grouped else "key"))
    check_sizes(rows.rows, given, where)
    return rows


def check_sizes(rows: Mapping[Split, Sequence[Any]], given: Collection[str], where: str) -> None:
    """Refuse splits that are too small.

    Splits in `given` have files of their own.

    Raises:
        UpcycleError: a split has fewer than two rows.
    """
    for split in SPLITS:
        if (count := len(rows[split])) < _LEAST_ROWS:
            own = "" if split in given else f", or a `{split}:` of its own"
            without = "; what the test split has is left out of it" if split == "validation" and split in given else ""
            raise UpcycleError(
                f"{where}: the {split} split has {count} example{'s' * (count != 1)}{without}; "
                f"must have {_LEAST_ROWS} or more; give more rows{own}"
            )


def _read_splits(data: OneTask, base: Path, where: str) -> Iterator[tuple[Split, list[Any]]]:
    """The rows of each split that is given."""
    match data:
        case TableData() | ConllData() | SentencesData():
            files = text_files(data, base, where)
            for split in SPLITS:
                if files[split]:
                    yield split, [row for file in files[split] for row in _read_file(file, data)]
        case HubTableData():
            for split in SPLITS:
                if (name := getattr(data, split)) is not None:
                    rows = open_hub_table(data, name)
                    yield split, list(read_hub_images(rows, data) if data.image else read_hub_rows(rows, data, name))
        case HubSentencesData():
            for split in SPLITS:
                if (name := getattr(data, split)) is not None:
                    values = read_hub_values(open_hub_table(data, name), data, name)
                    yield split, list(read_sentences(values, data))
        case ImagesData() | DigitsData():
            yield from read_image_splits(data, base)
        case _:
            assert_never(data)


def _read_file(file: Path, data: TableData | ConllData | SentencesData) -> Iterator[Any]:
    match data:
        case TableData():
            return read_table(file, data)
        case ConllData():
            return read_conll(file, data)
        case SentencesData():
            return read_sentences(read_rows(file), data)


def limit_rows(rows: Mapping[Split, Sequence[Row]], config: DataConfig) -> dict[Split, list[Row]]:
    """As many of each split as the settings allow, taken evenly."""
    places = {
        split: choose_evenly(len(rows[split]), getattr(config, f"max_{split}_examples")).tolist() for split in SPLITS
    }
    return {split: [rows[split][place] for place in places[split]] for split in SPLITS}


def digest_rows(rows: Mapping[Split, Sequence[Row]]) -> str:
    """The SHA-256 of rows and their labels, split by split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for row in rows[split]:
            digest.update(f"{split}\0{row.key}\0{json.dumps(row.answer)}\0".encode())
    return digest.hexdigest()


def choose_encoder(source: Path, config: DataConfig, vocabulary: Vocabulary) -> Callable[[Sequence[Any]], Encoded]:
    """What makes tensors of rows, by the tokenizer or processor in `source`."""
    if vocabulary.task == "image-classification":
        model_config = read_config(source)
        processor = load_processor(source)
        return partial(_encode_images, processor, count_image_tokens(model_config), vocabulary)
    filling = find_padding(read_config(source))
    if vocabulary.task == ANSWERING:
        return QuestionEncoder(load_tokenizer(source), config, filling)
    if vocabulary.task == VECTORS:
        return partial(encode_sentences, load_tokenizer(source), config.block_size, filling)
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
        IDS: pad([text.ids for text in texts], length, filling),
        MASK: pad([[1] * len(text.ids) for text in texts], length, 0),
    }
    if texts[0].types:
        tensors[TYPES] = pad([text.types for text in texts], length, 0)
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


def _number(
    rows: Sequence[LabelledRow], texts: Sequence[EncodedText], vocabulary: Vocabulary, length: int
) -> torch.Tensor:
    """The labels of texts as numbers."""
    numbers = vocabulary.numbers
    if vocabulary.task == OF_WORDS:
        found = torch.full((len(rows), length), UNLABELLED, dtype=torch.int32)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            for tag, first in zip(row.tags, text.firsts, strict=True):
                if first is not None:
                    found[place, first] = numbers[tag]
        return found
    if vocabulary.problem == VALUE:
        return torch.tensor([[row.label] for row in rows], dtype=torch.float32)
    if vocabulary.problem == SEVERAL:
        return torch.tensor([[label in names_of(row.answer) for label in numbers] for row in rows]).float()
    return torch.tensor([numbers[str(row.label)] for row in rows], dtype=torch.int32)
