"""Text as token ids and back, and in blocks [N, S]."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dense2moe.export.errors import ExportError
from dense2moe.upcycle.checkpoints.tokenizer import encode
from dense2moe.upcycle.errors import one_line_errors

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's tokens of a byte
# clean_up_tokenization takes spaces out of these, in this order
_CLEANED = (
    " .",
    " ?",
    " !",
    " ,",
    " ' ",
    " n't",
    " 'm",
    " 's",
    " 've",
    " 're",
)
_TAILS = sorted(
    {
        each[place:]
        for pattern in _CLEANED
        for each in (pattern, pattern.replace("'", " ' "))
        for place in range(1, len(each))
    }
)
"""What may follow, of which the beginning is there already.

Of a contraction also what the clean-up itself makes into one.
"""


def start_ids(tokenizer: Any, text: str, start: int | None = None) -> list[int]:
    """Token ids of a text, as the tokenizer starts one.

    With a start token only where the tokenizer adds one. A text without any is the token `start` alone, or the
    tokenizer's own that starts a text; empty where neither is known.

    Raises:
        UpcycleError: the tokenizer fails on the text.
    """
    ids = encode(tokenizer, text)
    start = tokenizer.bos_token_id if start is None else start
    return ids if ids or start is None else [start]


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a conversation that waits for the model's turn.

    The user has said `text`.

    Raises:
        ExportError: the tokenizer has no chat template, or it refuses.
    """
    if not tokenizer.chat_template:
        raise ExportError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add one, or prompt without the chat option"
        )
    with one_line_errors(
        tokenizer.name_or_path,
        "the chat template fails",
        "correct it, or prompt without the chat option",
        ExportError,
    ):
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
    return list(found["input_ids"])


def decode_stream(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text, piece by piece as tokens come.

    Which together is what transformers decodes of all of them without special tokens, beyond what it decodes of the
    prompt. A piece is held back as long as a later token could change it: bytes of a character that is not whole, or a
    space before punctuation where the tokenizer cleans up. What is held back at the end is the last piece, as
    transformers decodes it.
    """
    ids = list(prompt)
    shown = len(_decode(tokenizer, ids))
    for token in tokens:
        ids.append(token)
        text = _settled(tokenizer, ids)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    if rest := _decode(tokenizer, ids)[shown:]:
        yield rest


def _decode(tokenizer: Any, ids: Sequence[int], **settings: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, **settings)
    return text


def _settled(tokenizer: Any, ids: Sequence[int]) -> str:
    """The part of a decoded text that later tokens cannot change."""
    end = len(ids)
    # sentencepiece decodes a run of bytes as a whole: as characters, or each as U+FFFD
    while end and _may_be_in_run(tokenizer, ids[end - 1]):
        end -= 1
    text = _decode(tokenizer, ids[:end])
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        raw = _decode(tokenizer, ids[:end], clean_up_tokenization_spaces=False)
        cleaned = tokenizer.clean_up_tokenization(raw)
        if cleaned == raw or text != raw:  # else it has no effect: transformers passes over it for byte-level BPE
            text = _common_start([text, *(tokenizer.clean_up_tokenization(raw + tail) for tail in _TAILS)])
    return text.rstrip("\ufffd")


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all others lie between
    return first[
        : next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    ]


def _may_be_in_run(tokenizer: Any, token: int) -> bool:
    """Whether a token is a byte, or empty as special tokens are.

    Which are left out before bytes are decoded.
    """
    return _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))) is not None or not _decode(tokenizer, [token])
