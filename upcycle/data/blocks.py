"""Text to blocks of tokens: read, split, tokenize, pack.

Text is read as a stream, from the disk each time that it is asked for, so memory grows with the tokens that are kept (4
bytes each) and not with the text: a piece of at most 65,536 characters is in memory at a time.

1. A document is what lies between two separators, without blank lines before its first line and without white space
   behind its last. One that is longer than a piece is cut behind lines, and its pieces are tokenized one by one; a
   separator must fit into a piece.
2. Where a limit needs only a part of a text of more than a million characters, pieces are taken evenly from the whole,
   about twice as many as are needed, and the rest is not tokenized. Of the blocks that come of it as many as the limit
   allows are taken evenly.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, assert_never, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.reader import refuse_pointer
from dense2moe.upcycle.checkpoints.tokenizer import check_ids, encode, load_tokenizer
from dense2moe.upcycle.data.config import DataConfig, DataSource, DomainsData, HubData, PythonDocsData, TextData
from dense2moe.upcycle.data.python_docs import DOMAINS, SPLITS, Split, read_python_docs, read_sample
from dense2moe.upcycle.errors import UpcycleError, describe_error, one_line_errors, shorten
from dense2moe.upcycle.progress import Progress

FACTS_NAME = "data.json"
_HELD_OUT_PER_MILLE = 50
_PIECE_CHARS = 1 << 16
_WHOLE_CHARS = 1 << 20  # a text of no more is tokenized whole, whatever the limit
_SAMPLE = "A sentence, as any tokenizer has tokens for."
_CHARS_A_TOKEN = 9  # of the first attempt, which should be enough: English has 4 to 5


@dataclass(frozen=True)
class Piece:
    """A run of text: a document, or a part of a long one, which begins with `first` and ends with `last`."""

    text: str
    first: bool = True
    last: bool = True


Stream = Callable[[], Iterator[Piece]]
"""Documents, read anew at each call."""


@dataclass(frozen=True)
class Texts:
    """Documents of each domain, a stream for each split, their characters.

    And where they come from in words and digests.
    """

    domains: dict[str, dict[Split, Stream]]
    num_chars: dict[str, dict[Split, int]]
    facts: dict[str, str]


def read_texts(source: DataSource, base: Path) -> Texts:
    """Read the documents; relative paths of files start at `base`.

    Raises:
        UpcycleError: a file or data set is missing, not UTF-8 or empty.
    """
    streams, facts = _open_streams(source, base)
    surveys = {name: _survey(documents) for name, documents in streams.items()}
    if not isinstance(source, PythonDocsData):  # which has a digest of its own
        digests = {name: digest for name, (_, digest) in surveys.items()}
        facts |= (
            {f"digest of {name}": digest for name, digest in digests.items()}
            if isinstance(source, DomainsData)
            else {"digest": digests["text"]}
        )
    return Texts(streams, {name: num_chars for name, (num_chars, _) in surveys.items()}, facts)


def _open_streams(source: DataSource, base: Path) -> tuple[dict[str, dict[Split, Stream]], dict[str, str]]:
    match source:
        case PythonDocsData():
            docs = read_python_docs()
            texts = {
                domain: {split: [d.text for d in docs.documents[split] if d.domain == domain] for split in SPLITS}
                for domain in DOMAINS
            }
            streams = {
                str(domain): {split: partial(map, Piece, found[split]) for split in SPLITS}
                for domain, found in texts.items()
            }
            return cast("dict[str, dict[Split, Stream]]", streams), {
                "interpreter": f"CPython {docs.version}",
                "digest": docs.digest,
            }
        case TextData():
            return {"text": _open_files(source, base, "data.source")}, {}
        case HubData():
            return {"text": _open_hub(source, "data.source")}, {"data set": source.path}
        case DomainsData():
            resolve_files(source, base)
            return {
                name: _open_files(part, base, domain_place(name))
                if isinstance(part, TextData)
                else _open_hub(part, domain_place(name))
                for name, part in source.domains.items()
            }, {}
        case _:
            assert_never(source)


def _survey(documents: Mapping[Split, Stream]) -> tuple[dict[Split, int], str]:
    """How many characters each split has, and the SHA-256 of all documents with their splits, in order.

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
            raise UpcycleError(
                f"{where}.{split}: {shared} is also a train file; held-out text must not be trained on; give each "
                "file one split"
            )
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
                    f"{where}.{split}: {shared} is also a file of {trained[shared.resolve()]}.train; held-out text "
                    "must not be trained on; "
                    "give each file one split"
                )
    return files


def find_files(pattern: str, base: Path) -> list[Path]:
    """The files that a path or glob below `base` means, sorted.

    `~` is the home, and a name that is there may hold brackets.

    Raises:
        UpcycleError: it begins with `~`, and there is no such home.
    """
    parts = Path(pattern).parts
    root, name = base, pattern
    if parts and parts[0].startswith("~"):
        try:
            root, name = Path(parts[0]).expanduser(), str(Path(*parts[1:]))
        except RuntimeError as error:
            raise UpcycleError(f"'{pattern}' names no home directory; give the path in full") from error
    if (root / name).is_file():
        return [root / name]
    return [
        root / found for found in sorted(glob.glob(name, root_dir=root, recursive=True)) if (root / found).is_file()
    ]


def match_files(patterns: Iterable[str], base: Path, where: str) -> list[Path]:
    """The files that paths and globs below `base` mean, in the order given, each once; `where` names them in a refusal.

    Raises:
        UpcycleError: a path or glob matches no file.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        found = find_files(pattern, base)
        if not found:
            raise UpcycleError(
                f"{where}: '{pattern}' matches no file below {base}; give a path or glob of UTF-8 text files"
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _open_files(source: TextData, base: Path, where: str) -> dict[Split, Stream]:
    """The documents of each split; without a single one in a split they are refused.

    Without `validation` or `test` files the hash of a document, of its first piece if it is long, decides which of the
    train files' it falls into.
    """
    files = text_files(source, base, where)
    # as Python reads line ends
    separator = source.separator and source.separator.replace("\r\n", "\n").replace("\r", "\n")
    held_out = cast("list[Split]", [split for split in ("test", "validation") if not getattr(source, split)])

    def read(split: Split) -> Iterator[Piece]:
        if split in held_out or split == "train":
            for file in files["train"]:
                belongs = False
                for piece in _read_documents(file, separator):
                    belongs = _hashed_split(piece.text.strip(), held_out) == split if piece.first else belongs
                    if belongs:
                        yield piece
        else:
            for file in files[split]:
                yield from _read_documents(file, separator)

    for split in SPLITS:
        if next(read(split), None) is None:
            raise UpcycleError(
                f"{where}: no document falls into the {split} split; give `{split}:` files, or a `separator` that "
                "makes more documents"
            )
    return {split: partial(read, split) for split in SPLITS}


def read_file(file: Path) -> Iterator[str]:
    """The text of a file, a piece at a time, without a byte-order mark, every line end as one newline.

    Raises:
        UpcycleError: it is not UTF-8, a pointer of git-LFS, or cannot be read.
    """
    refuse_pointer(file)
    with (
        one_line_errors(file, "cannot be read", "mend its mode or its disk"),
        file.open(encoding="utf-8-sig") as stream,
    ):
        try:
            while text := stream.read(_PIECE_CHARS):
                yield text
        except UnicodeDecodeError:
            raise UpcycleError(f"{file}: not UTF-8 at byte {_find_bad_byte(file)}; convert it") from None


def _find_bad_byte(file: Path) -> int:
    """Where a file's first byte is that is not UTF-8: a stream that decodes only tells the place in its own buffer."""
    done = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return done + error.start
            done += len(line)
    return done


def _read_documents(file: Path, separator: str | None) -> Iterator[Piece]:
    """The documents of a file that are not blank, in order, the long ones in pieces."""
    held = ""
    # whether the next piece is its document's first, and whether one of it has been given
    first, open_document = (
        True,
        False,
    )
    for text in read_file(file):
        *whole, held = (held + text).split(separator) if separator else [held + text]
        for document in whole:
            if (piece := _trim(document, first, last=True)) or open_document:
                yield Piece(piece, first, True)
            first, open_document = True, False
        while len(held) > 2 * _PIECE_CHARS:
            cut = _find_cut(held)
            if piece := _trim(held[:cut], first, last=False):
                yield Piece(piece, first, False)
                first, open_document = False, True
            held = held[cut:]
    if (piece := _trim(held, first, last=True)) or open_document:
        yield Piece(piece, first, True)


def _trim(text: str, first: bool, last: bool) -> str:
    """Text without the blank lines before a document, whose first line keeps its indentation.

    And without white space behind it.
    """
    if last:
        text = text.rstrip()
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text) if first and text.strip() else "" if first else text


def _find_cut(text: str) -> int:
    """Where to cut a long text.

    Behind a line that another one follows without white space, where most tokenizers begin a new token.
    """
    for pattern in (r"\S\n(?=\S)", r"\n(?=\S)", r"\S(?=\s)"):
        places = [found.end() for found in re.finditer(pattern, text[: _PIECE_CHARS + 1])]
        if places:
            return places[-1]
    return _PIECE_CHARS


def _hashed_split(document: str, held_out: list[Split]) -> Split:
    number = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 1000
    for split in held_out:
        if number < _HELD_OUT_PER_MILLE:
            return split
        number -= _HELD_OUT_PER_MILLE
    return "train"


def _open_hub(source: HubData, place: str) -> dict[Split, Stream]:
    import datasets  # slow to import, and only this needs it

    where = f"{place}: data set '{source.path}'"
    documents: dict[Split, Stream] = {}
    for split in SPLITS:
        name = getattr(source, split)
        try:
            rows = datasets.load_dataset(source.path, source.name, revision=source.revision, split=name)
        except Exception as error:  # datasets raises many kinds for a missing set, split, revision or network
            raise UpcycleError(f"{where}, split '{name}': {describe_error(error)}") from error
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


def _read_rows(rows: Any, column: str, where: str) -> Iterator[Piece]:
    """The documents of a data set, which lies on the disk; rows without text are left out."""
    for row in rows.select_columns([column]):
        if not isinstance(text := row[column], str | None):
            raise UpcycleError(f"{where} holds {type(text).__name__}; it must hold text")
        if text and text.strip():
            yield Piece(text)


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
        packed = _pack_domains(tokenizer, texts, split, limits[split], config.block_size)
        for name, blocks in zip(texts.domains, packed, strict=True):
            if len(blocks) == 0:
                raise _too_short(split, name if len(packed) > 1 else None, config.block_size)
        domains = torch.cat(
            [torch.full((len(blocks),), number, dtype=torch.int32) for number, blocks in enumerate(packed)]
        )
        places = _choose_evenly(
            len(domains), None if (limit := limits[split]) is None else max(1, limit // config.block_size)
        )
        for number, name in enumerate(texts.domains):
            if number not in domains[places]:
                raise UpcycleError(
                    f"data.max_{split}_tokens is {limit}; it leaves none of the blocks of domain '{name}', which are "
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

    And a tokenizer with ids beyond the embedding's `num_rows` rows. Of each domain and split as much text is tokenized
    as makes one block. Data sets of the hub, and Python's documentation, are not opened.

    Raises:
        UpcycleError: no tokenizer, or one that fails or does not fit the model; no text, or too little for one block.
    """
    tokenizer = load_tokenizer(source)
    sample = read_sample() if isinstance(config.source, PythonDocsData) else _SAMPLE
    check_ids(tokenizer, num_rows, sample)
    parts = text_sources(config.source)
    for where, part in parts.items():
        name = where.removeprefix(domain_place("")) if isinstance(config.source, DomainsData) else None
        for split, documents in _open_files(part, base, where).items():
            if not _fills_block(tokenizer, documents(), config.block_size):
                raise _too_short(split, name, config.block_size)


def _fills_block(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[Piece], block_size: int) -> bool:
    """Whether text has tokens for one block; no more of it is tokenized."""
    num_tokens = 0
    for ids in _encode(tokenizer, pieces):
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
    """Text files as blocks of tokens, int64 [blocks, block_size], at most `num_blocks`, taken evenly from the whole.

    Raises:
        UpcycleError: no tokenizer in the directory `tokenizer`, a file that is not UTF-8, or too little text for one
            block.
    """
    pieces = (piece for file in files for piece in _join(read_file(file)))
    blocks = _pack(load_tokenizer(tokenizer), pieces, block_size)
    if len(blocks) == 0:
        names = ", ".join(map(str, files))
        raise UpcycleError(
            f"{names}: fewer tokens than one block of {block_size}; give more text or a smaller block size"
        )
    return blocks[_choose_evenly(len(blocks), num_blocks)].to(torch.int64)


def read_blocks(directory: Path, split: Split) -> torch.Tensor:
    """The blocks that `prepare_data` wrote; int64 [blocks, block_size]."""
    return load_file(directory / f"{split}.safetensors")["input_ids"].to(torch.int64)


def read_domains(directory: Path, split: Split) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of the domains, and the number of each block's; int64 [blocks]."""
    names = json.loads((directory / FACTS_NAME).read_text(encoding="utf-8"))["domains"]
    return tuple(names), load_file(directory / f"{split}.safetensors")["domains"].to(torch.int64)


def _join(texts: Iterator[str]) -> Iterator[Piece]:
    """The text of a file as one document, as it is."""
    held = ""
    first = True
    for text in texts:
        held += text
        while len(held) > 2 * _PIECE_CHARS:
            cut = _find_cut(held)
            yield Piece(held[:cut], first, False)
            held, first = held[cut:], False
    yield Piece(held, first, True)


def _pack_domains(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, split: Split, limit: int | None, block_size: int
) -> list[torch.Tensor]:
    """Blocks of each domain, int32 [blocks, block_size].

    Of all text, or of as much of each as a limit needs at least.
    """
    num_chars = sum(of_domain[split] for of_domain in texts.num_chars.values())
    share = (
        1.0
        if limit is None or num_chars <= _WHOLE_CHARS
        else min(1.0, _CHARS_A_TOKEN * max(limit, block_size) / num_chars)
    )
    while True:
        packed = [
            _pack(tokenizer, _take_evenly(documents[split](), share), block_size)
            for documents in texts.domains.values()
        ]
        if share == 1.0 or (all(map(len, packed)) and sum(blocks.numel() for blocks in packed) >= cast(int, limit)):
            return packed
        share = min(1.0, 2 * share)  # text of long tokens, or a domain of few pieces


def _take_evenly(pieces: Iterator[Piece], share: float) -> Iterator[Piece]:
    """About this share of the text, in pieces taken evenly.

    What follows a gap begins a document, and what goes before one ends it.
    """
    if share == 1.0:
        yield from pieces
        return
    seen = kept = 0
    is_open = False
    for piece in pieces:
        taken = kept <= share * seen
        seen += len(piece.text)
        if taken:
            kept += len(piece.text)
            yield replace(piece, first=not is_open)
            is_open = not piece.last
        elif is_open:
            yield Piece("", False, True)
            is_open = False


def _encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[Sequence[int]]:
    """Token ids of all documents.

    Where the tokenizer itself marks no start, the end-of-text token divides them, and opens the stream.
    """
    marked = encode(tokenizer, "a")
    marks_start = tokenizer.bos_token_id is not None and marked[:1] == [tokenizer.bos_token_id]
    divider = [] if marks_start or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bare = encode(tokenizer, "a", special=False)
    begin = next(
        (place for place in range(len(marked) - len(bare) + 1) if marked[place : place + len(bare)] == bare), 0
    )
    before, behind = marked[:begin], marked[begin + len(bare) :]
    yield divider
    for piece in pieces:
        if piece.first and piece.last:
            yield encode(tokenizer, piece.text)
        else:
            yield before if piece.first else ()
            yield encode(tokenizer, piece.text, special=False)
            yield behind if piece.last else ()
        yield divider if piece.last else ()


def _pack(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece], block_size: int) -> torch.Tensor:
    """Blocks of all tokens in order, int32 [blocks, block_size]; what is left of the last is dropped."""
    stream = array("i")
    for ids in _encode(tokenizer, pieces):
        stream.extend(ids)
    tokens = torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def _choose_evenly(count: int, wanted: int | None) -> torch.Tensor:
    """The places of at most `wanted` of `count` things, taken evenly from the whole; int64."""
    if wanted is None or wanted >= count:
        return torch.arange(count)
    places = torch.linspace(0, count - 1, wanted, dtype=torch.float64)  # float32 would take some twice from 10 000 on
    return places.round().long()
