"""Words and their tokens, against transformers' own alignment of words that are given one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.checkpoints.words import EncodedText, encode_text, join_words, split_words
from dense2moe.upcycle.data.labelled import encode_row
from dense2moe.upcycle.data.rows import LabelledRow
from dense2moe.upcycle.errors import UpcycleError

TEXT = ["Barack Obama was born in Honolulu , Hawaii .", "unbelievable internationalization", "the cat sat on a mat"]


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT: lower case without accents, punctuation apart, `[CLS]` and `[SEP]` around, pairs with types."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level(add_prefix_space: bool, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """As of RoBERTa and GPT-2: bytes, where a token begins with the space before its word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, add_prefix_space=add_prefix_space, bos_token="<s>", eos_token="</s>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    """As of XLM-R: pieces that begin with `▁` for the space before them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "word piece": word_piece,
    "byte level": lambda: byte_level(True),
    "byte level, offsets with spaces": lambda: byte_level(True, trim_offsets=False),
    "metaspace": metaspace,
}
WORDS = ["Barack", "U.S.", "cat's", "don't", "Zürich", "naïve", "日本", "🚀", "a", ",", "...", "C++", "born", "mat-sat"]


def theirs(tokenizer: PreTrainedTokenizerFast, words: Sequence[str], most: int) -> tuple[list[int], list[int | None]]:
    """Ids, and the first token of each word, as transformers' examples of token classification find it."""
    found = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=most)
    firsts: dict[int, int] = {}
    for place, word in enumerate(found.word_ids()):
        if word is not None:
            firsts.setdefault(word, place)
    return list(found["input_ids"]), [firsts.get(number) for number in range(len(words))]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tags_stand_where_transformers_puts_them(name: str) -> None:
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    for _ in range(60):
        words = draw.choices(WORDS, k=draw.randrange(1, 9))
        text, spans = join_words(words)
        for most in (512, 8):
            found = encode_text(tokenizer, text, most, words=spans)
            ids, firsts = theirs(tokenizer, words, most)
            assert list(found.ids) == ids, words
            assert list(found.firsts) == firsts, words


def test_without_a_space_before_the_first_word_words_begin_where_their_letters_do() -> None:
    """Words given to such a tokenizer one by one would have no spaces between; the text is read as it will be."""
    tokenizer, draw = byte_level(False), random.Random(1)
    assert tokenizer(["the", "cat"], is_split_into_words=True)["input_ids"] != tokenizer("the cat")["input_ids"]
    for _ in range(40):
        words = draw.choices(WORDS, k=draw.randrange(1, 9))
        text, spans = join_words(words)
        found = encode_text(tokenizer, text, 512, words=spans)
        assert list(found.ids) == tokenizer(text)["input_ids"]
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        for place, (begin, end) in zip(found.firsts, spans, strict=True):
            # tokens are of bytes: a space that merged with no letter is one of its own, trimmed to nothing
            inside = [n for n, (first, last) in enumerate(offsets[1:-1], 1) if begin <= first < end]
            assert place == inside[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_say_which_letters_a_token_is_of(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = "Barack Obama was born in Honolulu"
    found = encode_text(tokenizer, text, 512)
    covered = {place for begin, end in found.spans for place in range(begin, end)}
    assert covered >= {place for place, letter in enumerate(text) if letter != " "}
    special = tokenizer.get_special_tokens_mask(list(found.ids), already_has_special_tokens=True)
    assert all(span == (0, 0) for span, is_special in zip(found.spans, special, strict=True) if is_special)


def test_a_text_is_read_on_from_any_letter() -> None:
    tokenizer = word_piece()
    text, spans = join_words(["the", "cat", "sat", "on", "a", "mat"])
    late = encode_text(tokenizer, text, 512, words=spans, start=8)
    assert late.ids == encode_text(tokenizer, "sat on a mat", 512).ids
    assert late.firsts[:2] == (None, None)
    assert [late.spans[place] for place in late.firsts[2:] if place is not None] == spans[2:]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_cut_where_it_has_more_tokens_than_are_read(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    whole = encode_text(tokenizer, "the cat sat on a mat " * 20, 10_000)
    assert not whole.is_cut
    count = len(whole.ids)
    for most in (8, count - 1, count, count + 1):
        found = encode_text(tokenizer, "the cat sat on a mat " * 20, most)
        assert len(found.ids) == min(most, count)
        assert found.is_cut == (most < count)


def test_words_behind_the_cut_have_no_tag() -> None:
    tokenizer, words = word_piece(), ["cat"] * 30
    text, spans = join_words(words)
    found = encode_text(tokenizer, text, 12, words=spans)
    pieces = len(encode_text(tokenizer, "cat", 12).ids) - 2
    count = -(-10 // pieces)
    assert found.firsts == (*(1 + pieces * number for number in range(count)), *[None] * (30 - count))


def test_pairs_have_the_types_and_the_cut_that_transformers_gives_them() -> None:
    tokenizer = word_piece()
    for most in (512, 12):
        pair = ("the cat sat on a mat", "Barack was born in Hawaii")
        expected = tokenizer(*pair, truncation=True, max_length=most)
        found = encode_text(tokenizer, pair[0], most, pair[1])
        assert list(found.ids) == expected["input_ids"]
        assert list(found.types) == expected["token_type_ids"]
        assert set(found.types) == {0, 1}
        assert found.is_cut == (most == 12)
    assert encode_text(byte_level(True), "a", 512, "b").types == ()


def test_a_row_without_tokens_is_refused_by_its_place() -> None:
    tokenizer = word_piece()
    nothing = LabelledRow("rows.csv:3", "\u200b", words=("\u200b",), tags=("O",))
    with pytest.raises(
        UpcycleError, match=r"^rows\.csv:3: the tokenizer makes no tokens of its text; leave the row out"
    ):
        encode_row(tokenizer, 512, nothing)


def test_a_word_without_tokens_leaves_the_others_where_they_are() -> None:
    text, spans = join_words(["the", "\u200b", "cat"])
    found = encode_text(word_piece(), text, 512, words=spans)
    assert found.firsts[1] is None
    assert [text[slice(*found.spans[place])][0] for place in found.firsts if place is not None] == ["t", "c"]


def test_words_are_what_stands_between_white_space() -> None:
    for text in ("the  cat\tsat\n", "", " ", "one", "Zürich\u00a0🚀 x"):
        assert [text[begin:end] for begin, end in split_words(text)] == text.split()


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_gives_no_tags() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UpcycleError, match="the tokenizer, Slow, does not tell where its tokens stand"):
        encode_text(Slow(), "a", 8, words=[(0, 1)])  # type: ignore[arg-type]


def test_an_encoded_text_is_as_long_in_all_of_its_parts() -> None:
    found = encode_text(word_piece(), "the cat", 512)
    assert isinstance(found, EncodedText)
    assert len(found.ids) == len(found.types) == len(found.spans)
