"""Packing: tokens of all documents in order, cut into blocks.

Where a limit needs only a part of a text of more than a million characters, pieces are taken evenly from the whole,
about twice as many as are needed, and the rest is not tokenized. Of the blocks that come of it as many as the limit
allows are taken evenly.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.tokenizer import encode
from dense2moe.upcycle.data.documents import DocumentPiece
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.data.texts import Texts

_WHOLE_CHARS = 1 << 20  # a text of no more is tokenized whole, whatever the limit
_CHARS_A_TOKEN = 9  # of the first attempt, which should be enough: English has 4 to 5


def pack_domains(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, split: Split, limit: int | None, block_size: int
) -> list[torch.Tensor]:
    """Blocks of each domain, int32 [blocks, block_size].

    Of all text, or of as much as a limit needs.
    """
    num_chars = sum(of_domain[split] for of_domain in texts.num_chars.values())
    share = (
        1.0
        if limit is None or num_chars <= _WHOLE_CHARS
        else min(1.0, _CHARS_A_TOKEN * max(limit, block_size) / num_chars)
    )
    while True:
        packed = [
            pack(tokenizer, _take_evenly(documents[split](), share), block_size) for documents in texts.domains.values()
        ]
        if share == 1.0 or (all(map(len, packed)) and sum(blocks.numel() for blocks in packed) >= cast(int, limit)):
            return packed
        share = min(1.0, 2 * share)  # text of long tokens, or a domain of few pieces


def pack(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[DocumentPiece], block_size: int) -> torch.Tensor:
    """Blocks of all tokens in order, int32 [blocks, block_size].

    Tokens that do not fill the last block are dropped.
    """
    stream = array("i")
    for ids in encode_documents(tokenizer, pieces):
        stream.extend(ids)
    tokens = torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def encode_documents(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[DocumentPiece]) -> Iterator[Sequence[int]]:
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


def _take_evenly(pieces: Iterator[DocumentPiece], share: float) -> Iterator[DocumentPiece]:
    """Roughly this share of the text, in evenly spread pieces.

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
            yield DocumentPiece("", False, True)
            is_open = False


def choose_evenly(count: int, wanted: int | None) -> torch.Tensor:
    """Indices of at most `wanted` of `count` things, evenly spread; int64."""
    if wanted is None or wanted >= count:
        return torch.arange(count)
    places = torch.linspace(0, count - 1, wanted, dtype=torch.float64)  # float32 would take some twice from 10 000 on
    return places.round().long()
