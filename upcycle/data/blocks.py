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
from dense2moe.upcycle.data.config import DataConfig, DomainsData, InstalledData, PythonDocsData
from dense2moe.upcycle.data.documents import DocumentPiece, join_texts, read_file
from dense2moe.upcycle.data.files import domain_place, text_sources
from dense2moe.upcycle.data.held_out import SPLITS, Split
from dense2moe.upcycle.data.installed import find_installed, find_versions, installed_place
from dense2moe.upcycle.data.packing import choose_evenly, encode_documents, pack, pack_domains
from dense2moe.upcycle.data.python_docs import read_sample
from dense2moe.upcycle.data.texts import open_files, read_texts
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from dense2moe.upcycle.progress import Progress

FACTS_NAME = "data.json"
_SAMPLE = "A sentence, as any tokenizer has tokens for."


def prepare_data(source: Path, output: Path, config: DataConfig, base: Path, progress: Progress) -> dict[str, Any]:
    """Tokenize with the tokenizer in `source` and write `train`.

    `validation` and `test` as safetensors with `input_ids` int32 [blocks, block_size]. A block holds text of one
    domain, whose number is in `domains`, int32 [blocks]. Returns the facts of the data: tokens a split, the domains'
    names in the order of their numbers, digest, interpreter.

    Raises:
        UpcycleError: no tokenizer, no text, or too little text for one block of a domain in a split, or a limit that
            leaves none.
    """
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
    (output / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def check_data(source: Path, config: DataConfig, base: Path, num_rows: int) -> None:
    """Refuse what `prepare_data` would, as far as that is known at once.

    A tokenizer with ids beyond the embedding's `num_rows` rows is refused as well. Of each domain and split as much
    text is tokenized as makes one block. Data sets of the hub, Python's documentation and installed packages are not
    opened; that the packages are there is asked.

    Raises:
        UpcycleError: no tokenizer, or one that fails or does not fit the model; no text, or too little for one block.
    """
    tokenizer = load_tokenizer(source)
    sample = read_sample() if isinstance(config.source, PythonDocsData) else _SAMPLE
    check_ids(tokenizer, num_rows, sample)
    if isinstance(config.source, InstalledData):
        find_versions(config.source)
        for domain, installed in config.source.domains.items():
            find_installed(installed, installed_place(domain))
    parts = text_sources(config.source)
    for where, part in parts.items():
        name = where.removeprefix(domain_place("")) if isinstance(config.source, DomainsData) else None
        for split, documents in open_files(part, base, where).items():
            if not _fills_block(tokenizer, documents(), config.block_size):
                raise _too_short(split, name, config.block_size)


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
    """The blocks that `prepare_data` wrote; int64 [blocks, block_size].

    Raises:
        UpcycleError: there are none, or the file is damaged.
    """
    file = directory / f"{split}.safetensors"
    with one_line_errors(file, "cannot be read", "give the directory that prepare_data wrote"):
        return load_file(file)["input_ids"].to(torch.int64)


def read_domains(directory: Path, split: Split) -> tuple[tuple[str, ...], torch.Tensor]:
    """The domains' names, and each block's domain number, int64 [blocks]."""
    names = json.loads((directory / FACTS_NAME).read_text(encoding="utf-8"))["domains"]
    return tuple(names), load_file(directory / f"{split}.safetensors")["domains"].to(torch.int64)
