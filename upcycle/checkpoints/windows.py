"""Windows: a question with each stretch of its context.

A context that is longer than a model reads is read in stretches that overlap (Devlin et al. 2019, as their code does
for SQuAD), each behind the whole question. What answers a question is a stretch of the context, or nothing, which the
classification token stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.words import TextSpan
from dense2moe.upcycle.errors import UpcycleError

NO_ANSWER, OUTSIDE_CONTEXT = (0, 0), (-1, -1)
"""The spans of the token that stands for no answer, and of all that no answer can begin or end with."""


@dataclass(frozen=True)
class Window:
    """A question with a stretch of its context, tokenized.

    ids: of its tokens; types: their token types, empty where the tokenizer has none. spans: where in the context each
    token stands; `NO_ANSWER` of the one that stands for none, `OUTSIDE_CONTEXT` of all others.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    spans: tuple[TextSpan, ...]

    @property
    def none(self) -> int:
        """The place of the token that stands for no answer."""
        return self.spans.index(NO_ANSWER)

    def find(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and last token of a stretch of the context.

        None where it is not whole in this window, or has no token.
        """
        inside = [place for place, (first, last) in enumerate(self.spans) if first < end and last > start]
        if not inside or not self._is_whole(start, end):
            return None
        return inside[0], inside[-1]

    def _is_whole(self, start: int, end: int) -> bool:
        known = [span for span in self.spans if span[1] > span[0]]
        return known[0][0] <= start and end <= known[-1][1]


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, most_tokens: int, overlap: int, where: str
) -> tuple[Window, ...]:
    """A question's windows, of at most `most_tokens` each.

    Two that follow each other share `overlap` tokens of the context, or half of what a window has room for, if that is
    less.

    Raises:
        UpcycleError: the tokenizer does not tell where its tokens stand, or makes none of the context, or the question
            leaves no room for it; `where` names the question.
    """
    if not tokenizer.is_fast:
        raise UpcycleError(
            f"the tokenizer, {type(tokenizer).__name__}, does not tell where its tokens stand in a text; put the "
            "model's tokenizer.json beside it"
        )
    own = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    num_before = len(own) + tokenizer.num_special_tokens_to_add(pair=True)
    room = most_tokens - num_before
    if room < 1:
        raise UpcycleError(
            f"{where}: the question has {num_before} tokens with those around it, and a window {most_tokens}; must "
            "leave room for the context; shorten the question, or raise data.block_size where it is the smaller"
        )
    found = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=most_tokens,
        stride=min(overlap, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    windows = tuple(_list_windows(tokenizer, found))
    if not any(last > first for window in windows for first, last in window.spans):
        raise UpcycleError(f"{where}: the tokenizer makes no tokens of the context; leave the row out")
    return windows


def _list_windows(tokenizer: PreTrainedTokenizerBase, found: Any) -> Iterator[Window]:
    for number, ids in enumerate(found["input_ids"]):
        owners = found.sequence_ids(number)  # 1 of the context
        spans = [
            span if owner == 1 and span[1] > span[0] else OUTSIDE_CONTEXT
            for span, owner in zip(found["offset_mapping"][number], owners, strict=True)
        ]
        spans[_find_none(tokenizer, ids)] = NO_ANSWER
        types = found["token_type_ids"][number] if "token_type_ids" in found else ()
        yield Window(tuple(ids), tuple(types), tuple(spans))


def _find_none(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """The place of the classification token; else the first token's."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
