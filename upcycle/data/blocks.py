"""Blocks of token ids made from text, and read back.

Text is read as a stream, from the disk each time that it is asked for, so memory grows with the tokens that are kept (4
bytes each) and not with the text: a piece of at most 65,536 characters is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.tokenizer import check_ids, load_tokenizer
from dense2moe.upcycle.data.chats import CHATS, check_chats, prepare_chats
from dense2moe.upcycle.data.config import (
    ChatData,
    DataConfig,
    DomainsData,
    InstalledData,
    LabelledSource,
    PythonDocsData,
    TasksData,
    TextData,
)
from dense2moe.upcycle.data.documents import DocumentPiece, join_texts, read_file
from dense2moe.upcycle.data.files import domain_place, text_sources
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.installed import find_installed, find_versions, installed_place
from dense2moe.upcycle.data.labelled import check_labelled, prepare_labelled
from dense2moe.upcycle.data.packing import choose_evenly, encode_documents, pack, pack_domains
from dense2moe.upcycle.data.python_docs import read_sample
from dense2moe.upcycle.data.several import check_tasks, prepare_tasks
from dense2moe.upcycle.data.texts import open_files, read_texts
from dense2moe.upcycle.data.vocabulary import Vocabulary
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import UNLABELLED

FACTS_NAME = "data.json"
_SAMPLE = "A sentence, as any tokenizer has tokens for."


def prepare_data(source: Path, output: Path, config: DataConfig, base: Path, progress: Progress) -> dict[str, Any]:
    """Tokenize with the tokenizer in `source` and write every split.

    Labelled examples: see `prepare_labelled`. Text: `train`, `validation` and `test` as safetensors with `input_ids`
    int32 [blocks, block_size]. A block holds text of one domain, whose number is in `domains`, int32 [blocks]. Returns
    the facts of the data: tokens a split, the domains' names in the order of their numbers, digest, interpreter.

    Raises:
        UpcycleError: no tokenizer, no text, or too little text for one block of a domain in a split, or a limit that
            leaves none.
    """
    if isinstance(config.source, TasksData):
        return _write_facts(prepare_tasks(source, output, config, config.source, base, progress), output)
    if isinstance(config.source, LabelledSource):
        facts = prepare_labelled(source, output, config, config.source, base, progress)
        return _write_facts(facts, output)
    if isinstance(config.source, ChatData):
        return _write_facts(prepare_chats(source, output, config, config.source, base, progress), output)
    tokenizer = load_tokenizer(source)
    texts = read_texts(config.source, base)
    limits = {
        "train": config.max_train_tokens,
        "validation": config.max_validation_tokens,
        "test": config.max_test_tokens,
    }
    num_tokens = {}
    for number, split in enumerate(SPLITS):
        progress("tokenizing", number, len(SPLITS))
        packed = pack_domains(tokenizer, texts, split, limits[split], config.block_size)
        for name, blocks in zip(texts.domains, packed, strict=True):
            if len(blocks) == 0:
                raise _too_short(split, name if len(packed) > 1 else None, config.block_size)
        domains = torch.cat(
            [torch.full((len(blocks),), number, dtype=torch.int32) for number, blocks in enumerate(packed)]
        )
        places = choose_evenly(
            len(domains), None if (limit := limits[split]) is None else max(1, limit // config.block_size)
        )
        for number, name in enumerate(texts.domains):
            if number not in domains[places]:
                raise UpcycleError(
                    f"data.max_{split}_tokens is {limit}; it leaves no block of domain '{name}', which has "
                    f"{len(packed[number])} of "
                    f"{len(domains)}; raise it"
                )
        blocks = packed[0] if len(packed) == 1 else torch.cat(packed)
        blocks = blocks[places] if len(places) < len(blocks) else blocks
        del packed
        num_tokens[split] = blocks.numel()
        save_file({"input_ids": blocks, "domains": domains[places]}, output / f"{split}.safetensors")
    progress("tokenizing", len(SPLITS), len(SPLITS))
    facts = {"block_size": config.block_size, "num_tokens": num_tokens, "domains": list(texts.domains), **texts.facts}
    return _write_facts(facts, output)


def _write_facts(facts: dict[str, Any], output: Path) -> dict[str, Any]:
    (output / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def check_data(source: Path, config: DataConfig, base: Path, num_rows: int) -> Vocabulary | None:
    """Refuse what `prepare_data` would, as far as that is known at once.

    A tokenizer with ids beyond the embedding's `num_rows` rows is refused as well. Of each domain and split as much
    text is tokenized as makes one block. Data sets of the hub, Python's documentation and installed packages are not
    opened; that the packages are there is asked. Returns the labels of labelled examples, where they are known.

    Raises:
        UpcycleError: no tokenizer, or one that fails or does not fit the model; no text, or too little for one block.
    """
    if isinstance(config.source, TasksData):
        return check_tasks(source, config, config.source, base)
    if isinstance(config.source, LabelledSource):
        return check_labelled(source, config, config.source, base)
    if isinstance(config.source, ChatData):
        check_chats(source, config.source, base)
        return None
    tokenizer = load_tokenizer(source)
    sample = read_sample() if isinstance(config.source, PythonDocsData) else _SAMPLE
    check_ids(tokenizer, num_rows, sample)
    if isinstance(config.source, InstalledData):
        find_versions(config.source)
        for domain, installed in config.source.domains.items():
            find_installed(installed, installed_place(domain))
    parts = text_sources(config.source)
    for where, part in parts.items():
        assert isinstance(part, TextData), "labelled"
        name = where.removeprefix(domain_place("")) if isinstance(config.source, DomainsData) else None
        for split, documents in open_files(part, base, where).items():
            if not _fills_block(tokenizer, documents(), config.block_size):
                raise _too_short(split, name, config.block_size)
    return None


def _fills_block(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[DocumentPiece], block_size: int) -> bool:
    """Whether text fills one block; stops tokenizing when it does."""
    num_tokens = 0
    for ids in encode_documents(tokenizer, pieces):
        num_tokens += len(ids)
        if num_tokens >= block_size:
            return True
    return False


def _too_short(split: Split, domain: str | None, block_size: int) -> UpcycleError:
    whose = f"of domain '{domain}' " if domain is not None else ""
    return UpcycleError(
        f"data: the {split} split {whose}has fewer tokens than one block of {block_size}; give more text or a "
        "smaller block_size"
    )


def read_text_blocks(tokenizer: Path, files: Sequence[Path], block_size: int, num_blocks: int | None) -> torch.Tensor:
    """Text files as blocks of tokens, int64 [blocks, block_size].

    At most `num_blocks`, taken evenly from the whole.

    Raises:
        UpcycleError: no tokenizer in the directory `tokenizer`, a file that is not UTF-8, or too little text for one
            block.
    """
    pieces = (piece for file in files for piece in join_texts(read_file(file)))
    blocks = pack(load_tokenizer(tokenizer), pieces, block_size)
    if len(blocks) == 0:
        names = ", ".join(map(str, files))
        raise UpcycleError(
            f"{names}: fewer tokens than one block of {block_size}; give more text or a smaller block size"
        )
    return blocks[choose_evenly(len(blocks), num_blocks)].to(torch.int64)


def read_blocks(directory: Path, split: Split) -> torch.Tensor:
    """The text that `prepare_data` wrote, in blocks; int64 [blocks, block_size].

    Labelled texts follow each other without padding, as many as fill blocks of the longest text's length.

    Raises:
        UpcycleError: there is none, or the file is damaged.
    """
    tensors = read_tensors(directory, split)
    return _without_padding(tensors["input_ids"].long(), tensors.get("attention_mask"))


def read_counted(directory: Path, split: Split) -> torch.Tensor | None:
    """Which tokens of `read_blocks` a model is judged by; bool [blocks, block_size].

    None where all are; of chats what the assistant says.

    Raises:
        UpcycleError: as `read_blocks`.
    """
    if read_facts(directory).get("task") != CHATS:
        return None
    tensors = read_tensors(directory, split)
    return _without_padding(tensors["labels"] != UNLABELLED, tensors["attention_mask"])


def _without_padding(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Values of real tokens [N, S] behind one another, in blocks."""
    if mask is None:
        return rows
    real, length = rows[mask.bool()], rows.shape[-1]
    return real[: len(real) // length * length].view(-1, length)


def read_domains(directory: Path, split: Split) -> tuple[tuple[str, ...], torch.Tensor]:
    """The domains' names, and each example's domain number, int64 [examples]."""
    return tuple(read_facts(directory)["domains"]), read_tensors(directory, split)["domains"].long()


def read_tensors(directory: Path, split: Split) -> dict[str, torch.Tensor]:
    """All tensors of a split, as they are stored.

    Raises:
        UpcycleError: there are none, or the file is damaged.
    """
    file = directory / f"{split}.safetensors"
    with one_line_errors(file, "cannot be read", "give the directory that prepare_data wrote"):
        return load_file(file)


def read_facts(directory: Path) -> dict[str, Any]:
    """What `prepare_data` tells of its data.

    Raises:
        UpcycleError: the file is missing or damaged.
    """
    file = directory / FACTS_NAME
    with one_line_errors(file, "cannot be read", "give the directory that prepare_data wrote"):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
