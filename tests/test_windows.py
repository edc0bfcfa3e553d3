"""Windows of long contexts: nothing is left out, and answers stand at the tokens that spell them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from test_words import TEXT, byte_level, word_piece
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.checkpoints.windows import NO_ANSWER, OUTSIDE_CONTEXT, Window, encode_question
from dense2moe.upcycle.data.config import DataConfig
from dense2moe.upcycle.data.question_examples import QuestionEncoder, find_answer
from dense2moe.upcycle.data.questions import QuestionRow
from dense2moe.upcycle.errors import UpcycleError

WORDS = (*TEXT[0].split(), *TEXT[2].split(), "unbelievable", "🚀", "Zürich")
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "word pieces": word_piece,
    "bytes": lambda: byte_level(False),
    "bytes with spaces": lambda: byte_level(False, trim_offsets=False),
}
QUESTION = "who sat on a mat"


def draw_context(seed: int, num_words: int = 40) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", "  ", "\n", ", "]) for _ in range(num_words)).strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("most", "overlap"), [(30, 3), (30, 100), (48, 0), (4000, 8)])
def test_windows_hold_the_question_and_the_whole_context(name: str, most: int, overlap: int) -> None:
    """Stretches put together are what the tokenizer makes of the whole context, each beside the whole question."""
    tokenizer = TOKENIZERS[name]()
    context = draw_context(0)
    whole = tokenizer(QUESTION, context)
    owners = whole.sequence_ids(0)
    first, last = owners.index(1), len(owners) - owners[::-1].index(1)
    before, inside, after = whole["input_ids"][:first], whole["input_ids"][first:last], whole["input_ids"][last:]
    windows = encode_question(tokenizer, QUESTION, context, most, overlap, "row 1")
    shared = min(overlap, (most - len(before) - len(after)) // 2)
    assert [len(window.ids) <= most for window in windows] == [True] * len(windows)
    read: list[int] = []
    for window in windows:
        assert list(window.ids[: len(before)]) == before
        assert list(window.ids[len(window.ids) - len(after) :]) == after
        own = list(window.ids[len(before) : len(window.ids) - len(after)])
        kept = shared if read else 0
        assert not kept or read[-kept:] == own[:kept]
        read += own[kept:]
    assert read == inside
    assert (len(windows) == 1) == (most == 4000)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_is_found_where_its_tokens_spell_it(name: str) -> None:
    """Every stretch of words is looked for in every window; a loop over characters says which tokens are its own."""
    tokenizer = TOKENIZERS[name]()
    context = draw_context(1, 25)
    windows = encode_question(tokenizer, QUESTION, context, 44, 8, "row 1")
    assert len(windows) > 1
    starts = [place for place in range(len(context)) if context[place].isalnum() and not context[place - 1].isalnum()]
    found = 0
    for start in starts:
        for end in (start + length for length in (3, 7, 15)):
            answer = context[start:end]
            if answer != answer.strip() or end > len(context):
                continue
            for window in windows:
                owned = set()
                for place, (first, last) in enumerate(window.spans):
                    owned |= {(character, place) for character in range(max(first, start), min(last, end))}
                letters = {each for each in range(start, end) if not context[each].isspace()}
                is_whole = letters <= {character for character, _ in owned}
                places = sorted(place for _, place in owned)
                assert window.find(start, end) == ((places[0], places[-1]) if is_whole else None)
                found += is_whole
    assert found > 20


def test_no_answer_is_the_classification_token_s() -> None:
    tokenizer = byte_level(False)
    (window,) = encode_question(tokenizer, "who", "the cat", 40, 4, "row 1")
    assert window.none == 0
    assert window.spans[0] == NO_ANSWER
    tokenizer.cls_token = "</s>"
    (window,) = encode_question(tokenizer, "who", "the cat", 40, 4, "row 1")
    assert window.none == window.ids.index(tokenizer.cls_token_id) > 0
    assert window.spans[0] == OUTSIDE_CONTEXT


def test_rows_are_windows_and_those_without_the_answer_point_to_none() -> None:
    tokenizer, context = word_piece(), draw_context(2)
    start = context.index("Honolulu")
    rows = [
        QuestionRow("row 0", "where", context, ("Honolulu", "the"), (start, context.index("the"))),
        QuestionRow("row 1", "where not", context, (), ()),
        QuestionRow("row 2", "what", context, (context,), (0,)),  # longer than any window
        QuestionRow("row 3", "who", "the cat sat", (" cat ",), (3,)),
    ]
    config = DataConfig.model_validate({"source": {"kind": "digits"}, "block_size": 24, "stride": 8})
    encoded = QuestionEncoder(tokenizer, config, 7)(rows)
    tensors = encoded.tensors
    windows = {row.number: encode_question(tokenizer, row.question, row.context, 24, 8, row.where) for row in rows}
    assert encoded.num_cut == 1
    assert tensors["questions"].tolist() == [number for number, own in windows.items() for _ in own]
    lengths = [len(window.ids) for own in windows.values() for window in own]
    assert tensors["attention_mask"].sum(-1).tolist() == lengths
    assert encoded.num_tokens == sum(lengths)
    assert (tensors["input_ids"][tensors["attention_mask"] == 0] == 7).all()
    spans_of = torch.stack([tensors["span_starts"], tensors["span_ends"]], -1)
    assert (spans_of[tensors["attention_mask"] == 0] == -1).all()
    said: dict[int, list[str]] = {row.number: [] for row in rows}
    texts = {row.number: row.context for row in rows}
    for number, spans, (first, last) in zip(
        tensors["questions"].tolist(), spans_of, tensors["labels"].tolist(), strict=True
    ):
        said[number].append(texts[number][int(spans[first, 0]) : int(spans[last, 1])])
    answers = list(said.values())
    assert set(answers[0]) == {"Honolulu", ""}
    assert set(answers[1]) == set(answers[2]) == {""}
    assert answers[3] == ["cat"]
    assert encoded.longest_answer == max(
        last - first + 1
        for first, last in filter(None, (find_answer(rows[0], each) for each in windows[rows[0].number]))
    )


def test_a_question_without_room_and_a_context_without_tokens_are_refused() -> None:
    tokenizer = word_piece()
    with pytest.raises(UpcycleError, match="row 1: the question has 43 tokens with those around it, and a window 24"):
        encode_question(tokenizer, "the " * 40, "the cat", 24, 8, "row 1")
    with pytest.raises(UpcycleError, match="row 1: the tokenizer makes no tokens of the context; leave the row out"):
        encode_question(tokenizer, "who", " \n ", 24, 8, "row 1")


def test_a_window_of_a_window_s_size_goes_on_by_half_of_its_room() -> None:
    """However much of two windows is asked to be shared, they go on."""
    windows = encode_question(word_piece(), "the cat", "sat on a mat " * 10, 15, 1000, "row 1")
    firsts = [min(start for start, end in window.spans if end > start) for window in windows]
    assert all(later > earlier for earlier, later in pairwise(firsts))


def test_what_is_no_span_has_no_token() -> None:
    window = Window((1, 2, 3), (), (NO_ANSWER, (0, 3), (4, 7)))
    assert window.find(3, 4) is None
    assert window.find(0, 7) == (1, 2)
    assert window.find(0, 8) is None
    assert torch.tensor(window.spans).shape == (3, 2)
