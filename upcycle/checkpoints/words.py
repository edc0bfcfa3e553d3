"""Words and tokens: the first token of each word.

A tokenizer of transformers knows where in the text each of its tokens stands. So words need not be tokenized one by
one: a text is tokenized whole, as it will be read later, and a token belongs to the word that its first character
is of, or that its space stands before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.errors import UpcycleError

TextSpan = tuple[int, int]
"""Where a word begins in its text, and where it ends."""


@dataclass(frozen=True)
class EncodedText:
    """A tokenized text.

    ids: of its tokens; types: their token types, empty where the tokenizer has none. firsts: of each word the place of
    its first token, None where it has none or lies behind what is read. spans: where in the text each token stands;
    (0, 0) of special tokens and of a pair's second text. is_cut: whether the text goes on behind its last token.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    firsts: tuple[int | None, ...]
    spans: tuple[TextSpan, ...]
    is_cut: bool


def split_words(text: str) -> list[TextSpan]:
    """Where the words between white space stand in a text."""
    spans: list[TextSpan] = []
    start: int | None = None
    for place, character in enumerate([*text, " "]):
        if character.isspace():
            if start is not None:
                spans.append((start, place))
            start = None
        elif start is None:
            start = place
    return spans


def join_words(words: Sequence[str]) -> tuple[str, list[TextSpan]]:
    """Words with spaces between, and where each stands."""
    spans, place = [], 0
    for word in words:
        spans.append((place, place + len(word)))
        place += len(word) + 1
    return " ".join(words), spans


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    most_tokens: int,
    pair: str | None = None,
    words: Sequence[TextSpan] = (),
    start: int = 0,
) -> EncodedText:
    """Tokenize a text, or a pair of texts, with special tokens.

    At most `most_tokens`; a long text is read from character `start` on, of which the words' spans are told as ever.

    Raises:
        UpcycleError: words are asked for, and the tokenizer does not tell where its tokens stand.
    """
    if words and not tokenizer.is_fast:
        raise UpcycleError(
            f"the tokenizer, {type(tokenizer).__name__}, does not tell where its tokens stand in a text; put the "
            "model's tokenizer.json beside it"
        )
    found = tokenizer(
        text[start:],
        pair,
        truncation=True,
        max_length=most_tokens,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    offsets = found["offset_mapping"] if tokenizer.is_fast else [(0, 0)] * len(found["input_ids"])
    owners = found.sequence_ids() if tokenizer.is_fast else [None] * len(offsets)  # 0 of the text, 1 of its pair
    spans = tuple(
        (start + first, start + last) if owner == 0 else (0, 0)
        for (first, last), owner in zip(offsets, owners, strict=True)
    )
    return EncodedText(
        ids=tuple(found["input_ids"]),
        types=tuple(found.get("token_type_ids", ())),
        firsts=_find_firsts(text, [place for place, owner in enumerate(owners) if owner == 0], spans, words),
        spans=spans,
        is_cut=_is_cut(tokenizer, text[start:], pair, len(found["input_ids"]), most_tokens),
    )


def _find_firsts(
    text: str, places: Sequence[int], spans: Sequence[TextSpan], words: Sequence[TextSpan]
) -> tuple[int | None, ...]:
    """The first token of each word, of the tokens at `places`.

    A token of nothing but the space before a word (`▁`, `Ġ`) is the word's first, as transformers has it where words
    are given one by one.
    """
    begins: dict[int, int] = {}
    for place in places if words else ():
        first = spans[place][0]
        while first < len(text) and text[first].isspace():
            first += 1
        begins.setdefault(first, place)
    starts = sorted(begins)
    found: list[int | None] = []
    number = 0
    for begin, end in words:
        while number < len(starts) and starts[number] < begin:
            number += 1
        inside = number < len(starts) and starts[number] < end
        found.append(begins[starts[number]] if inside else None)
    return tuple(found)


def _is_cut(tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, length: int, most: int) -> bool:
    """Whether a text has more tokens than were read."""
    return length >= most and len(tokenizer(text, pair, verbose=False)["input_ids"]) > most
