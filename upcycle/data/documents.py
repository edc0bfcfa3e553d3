"""Documents of a text file, a piece at a time.

A document is what lies between two separators, without blank lines before its first line and without white space behind
its last. A document that is longer than a piece is cut behind lines, and its pieces are tokenized one by one; a
separator must fit into a piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dense2moe.upcycle.checkpoints.pointers import refuse_pointer
from dense2moe.upcycle.errors import UpcycleError, one_line_errors

_PIECE_CHARS = 1 << 16


@dataclass(frozen=True)
class DocumentPiece:
    """A document, or a part of a long one.

    Its first part has `first` set, its last part `last`.
    """

    text: str
    first: bool = True
    last: bool = True


Stream = Callable[[], Iterator[DocumentPiece]]
"""Documents, read anew at each call."""


def read_file(file: Path) -> Iterator[str]:
    """A file's text, a piece at a time.

    Without a byte-order mark; every line end becomes one newline.

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
    """Where a file stops being UTF-8.

    A decoding stream knows only the place in its own buffer.
    """
    done = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return done + error.start
            done += len(line)
    return done


def read_documents(file: Path, separator: str | None) -> Iterator[DocumentPiece]:
    """A file's documents in order, long ones in pieces; blank ones dropped."""
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
                yield DocumentPiece(piece, first, True)
            first, open_document = True, False
        while len(held) > 2 * _PIECE_CHARS:
            cut = _find_cut(held)
            if piece := _trim(held[:cut], first, last=False):
                yield DocumentPiece(piece, first, False)
                first, open_document = False, True
            held = held[cut:]
    if (piece := _trim(held, first, last=True)) or open_document:
        yield DocumentPiece(piece, first, True)


def join_texts(texts: Iterator[str]) -> Iterator[DocumentPiece]:
    """A file's text as one document, unchanged."""
    held = ""
    first = True
    for text in texts:
        held += text
        while len(held) > 2 * _PIECE_CHARS:
            cut = _find_cut(held)
            yield DocumentPiece(held[:cut], first, False)
            held, first = held[cut:], False
    yield DocumentPiece(held, first, True)


def _trim(text: str, first: bool, last: bool) -> str:
    """Text without leading blank lines and trailing white space.

    The first line keeps its indentation.
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
