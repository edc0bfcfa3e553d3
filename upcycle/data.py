"""Text to blocks of tokens: read, split, tokenize, pack."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from upcycle.config import DataConfig, DataSource, DomainsData, HubData, PythonDocsData, TextData
from upcycle.errors import UpcycleError
from upcycle.progress import Progress
from upcycle.python_docs import DOMAINS, SPLITS, Split, read_python_docs

FACTS_NAME = "data.json"
_HELD_OUT_PER_MILLE = 50


@dataclass(frozen=True)
class Texts:
    """Documents of each domain, a split each, and where they come from in words and digests."""

    domains: dict[str, dict[Split, tuple[str, ...]]]
    facts: dict[str, str]


def read_texts(source: DataSource, base: Path) -> Texts:
    """Read the documents; relative paths of files start at `base`.

    Raises:
        UpcycleError: a file or data set is missing, not UTF-8 or empty.
    """
    match source:
        case PythonDocsData():
            docs = read_python_docs()
            domains = {domain: {split: tuple(d.text for d in docs.documents[split] if d.domain == domain) for split in SPLITS} for domain in DOMAINS}
            return Texts(
                {str(name): documents for name, documents in domains.items()}, {"interpreter": f"CPython {docs.version}", "digest": docs.digest}
            )
        case TextData():
            documents = _read_files(source, base, "data.source")
            return Texts({"text": documents}, {"digest": digest_texts(documents)})
        case HubData():
            documents = _read_hub(source, "data.source")
            return Texts({"text": documents}, {"data set": source.path, "digest": digest_texts(documents)})
        case DomainsData():
            resolve_files(source, base)
            named = {
                name: _read_files(part, base, domain_place(name)) if isinstance(part, TextData) else _read_hub(part, domain_place(name))
                for name, part in source.domains.items()
            }
            return Texts(named, {f"digest of {name}": digest_texts(documents) for name, documents in named.items()})
        case _:
            assert_never(source)


def domain_place(name: str) -> str:
    """Where in a recipe one domain's source is, as messages name it."""
    return f"data.source.domains.{name}"


def text_sources(source: DataSource) -> dict[str, TextData]:
    """Every source of text files, by its place in the recipe."""
    match source:
        case TextData():
            return {"data.source": source}
        case DomainsData():
            return {domain_place(name): part for name, part in source.domains.items() if isinstance(part, TextData)}
        case _:
            return {}


def text_files(source: TextData, base: Path, where: str = "data.source") -> dict[Split, list[Path]]:
    """The files of each split, globs resolved, in the order given; `where` names the source in a refusal.

    Raises:
        UpcycleError: a path or glob matches no file, or a held-out file is also trained on.
    """
    given: dict[Split, tuple[str, ...]] = {"train": source.train, "validation": source.validation, "test": source.test}
    files: dict[Split, list[Path]] = {}
    for split, patterns in given.items():
        files[split] = match_files(patterns, base, f"{where}.{split}")
    trained = {file.resolve() for file in files["train"]}
    for split in ("validation", "test"):
        if shared := next((file for file in files[split] if file.resolve() in trained), None):
            raise UpcycleError(f"{where}.{split}: {shared} is also a train file; held-out text must not be trained on; give each file one split")
    return files


def resolve_files(source: DataSource, base: Path) -> dict[str, dict[Split, list[Path]]]:
    """The files of each split of every source of text files, by its place in the recipe.

    Raises:
        UpcycleError: as `text_files`, or a file that one domain holds out is trained on in another.
    """
    files = {where: text_files(text, base, where) for where, text in text_sources(source).items()}
    trained = {file.resolve(): where for where, splits in files.items() for file in splits["train"]}
    for where, splits in files.items():
        for split in ("validation", "test"):
            if shared := next((file for file in splits[split] if file.resolve() in trained), None):
                raise UpcycleError(
                    f"{where}.{split}: {shared} is also a file of {trained[shared.resolve()]}.train; held-out text must not be trained on; "
                    "give each file one split"
                )
    return files


def match_files(patterns: Iterable[str], base: Path, where: str) -> list[Path]:
    """The files that paths and globs below `base` mean, in the order given; `where` names them in a refusal.

    Raises:
        UpcycleError: a path or glob matches no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        literal = (base / pattern).is_file()  # a name may hold brackets
        names = [pattern] if literal else sorted(glob.glob(pattern, root_dir=base, recursive=True))
        found = [base / name for name in names if (base / name).is_file()]
        if not found:
            raise UpcycleError(f"{where}: '{pattern}' matches no file below {base}; give a path or glob of UTF-8 text files")
        files += found
    return files


def _read_files(source: TextData, base: Path, where: str) -> dict[Split, tuple[str, ...]]:
    documents: dict[Split, list[str]] = {split: [] for split in SPLITS}
    held_out = [split for split in ("test", "validation") if not getattr(source, split)]
    for split, files in text_files(source, base, where).items():
        for file in files:
            text = _read_file(file)
            for document in text.split(source.separator) if source.separator else [text]:
                if document := document.strip():
                    documents[_hashed_split(document, cast("list[Split]", held_out)) if split == "train" else split].append(document)
    for split in SPLITS:
        if not documents[split]:
            raise UpcycleError(
                f"{where}: no document falls into the {split} split; give `{split}:` files, or a `separator` that makes more documents"
            )
    return {s: tuple(d) for s, d in documents.items()}


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{file}: not UTF-8 at byte {error.start}; convert it") from error


def _hashed_split(document: str, held_out: list[Split]) -> Split:
    number = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 1000
    for split in held_out:
        if number < _HELD_OUT_PER_MILLE:
            return split
        number -= _HELD_OUT_PER_MILLE
    return "train"


def _read_hub(source: HubData, place: str) -> dict[Split, tuple[str, ...]]:
    import datasets  # slow to import, and only this needs it

    where = f"{place}: data set '{source.path}'"
    documents: dict[Split, list[str]] = {}
    for split in SPLITS:
        name = getattr(source, split)
        try:
            rows = datasets.load_dataset(source.path, source.name, revision=source.revision, split=name)
        except Exception as error:  # datasets raises many kinds for a missing set, split, revision or network
            raise UpcycleError(f"{where}, split '{name}': {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        if source.text_column not in rows.column_names:
            raise UpcycleError(f"{where}: no column '{source.text_column}'; it has {', '.join(rows.column_names)}")
        if other := {type(text).__name__ for text in rows[source.text_column]} - {"str", "NoneType"}:
            raise UpcycleError(f"{where}: column '{source.text_column}' of split '{name}' holds {', '.join(sorted(other))}; it must hold text")
        documents[split] = [text for text in rows[source.text_column] if text and text.strip()]
        if not documents[split]:
            raise UpcycleError(f"{where}: split '{name}' has no text in column '{source.text_column}'")
    return {s: tuple(d) for s, d in documents.items()}


def digest_texts(documents: Mapping[Split, Sequence[str]]) -> str:
    """SHA-256 of all documents with their splits, in order."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for text in documents[split]:
            digest.update(f"{split}\0{text}\0".encode())
    return digest.hexdigest()


def prepare_data(source: Path, output: Path, config: DataConfig, base: Path, progress: Progress) -> dict[str, Any]:
    """Tokenize with the tokenizer in `source` and write `train`, `validation` and `test` as safetensors with `input_ids` int32 [blocks, block_size].

    A block holds text of one domain, whose number is in `domains`, int32 [blocks]. Returns the facts of the data: tokens a split, the domains'
    names in the order of their numbers, digest, interpreter.

    Raises:
        UpcycleError: no tokenizer, no text, or too little text for one block of a domain in a split, or a limit that leaves none.
    """
    tokenizer = _load_tokenizer(source)
    texts = read_texts(config.source, base)
    limits = {"train": config.max_train_tokens, "validation": config.max_validation_tokens, "test": config.max_test_tokens}
    num_tokens = {}
    for number, split in enumerate(SPLITS):
        progress("tokenizing", number, len(SPLITS))
        packed = [_pack(tokenizer, documents[split], config.block_size) for documents in texts.domains.values()]
        for name, blocks in zip(texts.domains, packed, strict=True):
            if len(blocks) == 0:
                whose = f"of domain '{name}' " if len(packed) > 1 else ""
                raise UpcycleError(
                    f"data: the {split} split {whose}has fewer tokens than one block of {config.block_size}; give more text or a smaller block_size"
                )
        domains = torch.cat([torch.full((len(blocks),), number, dtype=torch.int32) for number, blocks in enumerate(packed)])
        places = _choose_evenly(len(domains), None if (limit := limits[split]) is None else max(1, limit // config.block_size))
        for number, name in enumerate(texts.domains):
            if number not in domains[places]:
                raise UpcycleError(
                    f"data.max_{split}_tokens is {limit}; it leaves none of the blocks of domain '{name}', which are {len(packed[number])} of "
                    f"{len(domains)}; raise it"
                )
        blocks = torch.cat(packed)[places]
        num_tokens[split] = blocks.numel()
        save_file({"input_ids": blocks, "domains": domains[places]}, output / f"{split}.safetensors")
    progress("tokenizing", len(SPLITS), len(SPLITS))
    facts = {"block_size": config.block_size, "num_tokens": num_tokens, "domains": list(texts.domains), **texts.facts}
    (output / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds here, plain Exception among them; each is the file's fault
        raise UpcycleError(
            f"{source}: no tokenizer that transformers can load ({' '.join(str(error).split())[:200]}); put tokenizer.json there"
        ) from error
    return tokenizer


def read_text_blocks(tokenizer: Path, files: Sequence[Path], block_size: int, num_blocks: int | None) -> torch.Tensor:
    """Text files as blocks of tokens, int64 [blocks, block_size], at most `num_blocks`, taken evenly from the whole.

    Raises:
        UpcycleError: no tokenizer in the directory `tokenizer`, a file that is not UTF-8, or too little text for one block.
    """
    blocks = _pack(_load_tokenizer(tokenizer), [_read_file(file) for file in files], block_size)
    if len(blocks) == 0:
        names = ", ".join(map(str, files))
        raise UpcycleError(f"{names}: fewer tokens than one block of {block_size}; give more text or a smaller block size")
    return blocks[_choose_evenly(len(blocks), num_blocks)].to(torch.int64)


def read_blocks(directory: Path, split: Split) -> torch.Tensor:
    """The blocks that `prepare_data` wrote; int64 [blocks, block_size]."""
    return load_file(directory / f"{split}.safetensors")["input_ids"].to(torch.int64)


def read_domains(directory: Path, split: Split) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of the domains, and the number of each block's; int64 [blocks]."""
    names = json.loads((directory / FACTS_NAME).read_text(encoding="utf-8"))["domains"]
    return tuple(names), load_file(directory / f"{split}.safetensors")["domains"].to(torch.int64)


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[int]:
    """Token ids of all documents. Where the tokenizer itself marks no start, the end-of-text token divides them, and opens the stream."""
    marks_start = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    divider = None if marks_start else tokenizer.eos_token_id
    if divider is not None:
        yield divider
    for document in documents:
        yield from tokenizer(document, verbose=False)["input_ids"]
        if divider is not None:
            yield divider


def _pack(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], block_size: int) -> torch.Tensor:
    stream = torch.tensor(list(_encode(tokenizer, documents)), dtype=torch.int32)
    return stream[: len(stream) // block_size * block_size].view(-1, block_size)


def _choose_evenly(count: int, wanted: int | None) -> torch.Tensor:
    """The places of at most `wanted` of `count` things, taken evenly from the whole; int64."""
    if wanted is None or wanted >= count:
        return torch.arange(count)
    places = torch.linspace(0, count - 1, wanted, dtype=torch.float64)  # float32 would take some twice from 10 000 on
    return places.round().long()
