"""Text as token ids and back, as transformers has it; calibration reads as much text as the widths of experts need."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from made_tokenizers import CONTRACTIONS, TOKENIZERS, byte_fallback, byte_level
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.calibration_size import count_calibration_tokens
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.runtime.text import chat_ids, decode_stream, start_ids
from dense2moe.upcycle.errors import UpcycleError


def test_calibration_reads_four_tokens_for_each_input_of_an_expert_that_has_its_share() -> None:
    auto = QuantizeConfig()
    real = MixtralConfig(hidden_size=576, intermediate_size=1536, num_local_experts=4, num_experts_per_tok=2)
    assert count_calibration_tokens(auto, real) == 4 * 1536 * 2
    fine = Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=256, intermediate_size=3072, num_experts=16, num_experts_per_tok=8
    )
    assert count_calibration_tokens(auto, fine) == 8192, "no less than that"
    large = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2)
    assert count_calibration_tokens(auto, large) == 32768, "no more than that"
    assert count_calibration_tokens(auto, LlamaConfig(hidden_size=576, intermediate_size=2560)) == 4 * 2560
    assert count_calibration_tokens(QuantizeConfig(calibration_tokens=100), real) == 100


# Prompts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_the_tokenizer_makes_of_it(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for text in ("Once upon a time", " a", "<s>a", "é 😀"):
        assert start_ids(tokenizer, text, 7) == tokenizer(text).input_ids
    assert start_ids(tokenizer, "", 7) == (tokenizer("").input_ids or [7])


def test_a_text_without_tokens_is_the_token_that_starts_one() -> None:
    assert start_ids(byte_level(), "") == [0]
    assert start_ids(byte_fallback(), "") == [0]
    nameless = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    assert (start_ids(nameless, ""), start_ids(nameless, "", 5)) == ([], [5])


def test_a_tokenizer_that_cannot_encode_a_text_is_one_line() -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")), name_or_path="words"
    )
    with pytest.raises(UpcycleError, match=r"^words: the tokenizer fails on a text \([^\n]*\); [^\n]*$"):
        start_ids(words, "b")


def test_a_user_s_words_go_into_the_chat_template() -> None:
    tokenizer = byte_level(name_or_path="here")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
        "add_generation_prompt %}[model]{% endif %}"
    )
    assert chat_ids(tokenizer, "Hi") == tokenizer("<s>[user]Hi[model]").input_ids
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ExportError, match=r"^here: the chat template fails [^\n]*no[^\n]*$"):
        chat_ids(tokenizer, "Hi")
    with pytest.raises(ExportError, match=r"^words: the tokenizer has no chat template; "):
        chat_ids(byte_level(name_or_path="words"), "Hi")


# Texts as they come


def draw_ids(tokenizer: PreTrainedTokenizerFast, draw: random.Random) -> list[int]:
    """Any tokens, or the bytes of a text, some of which are lost."""
    if draw.random() < 0.5:
        return [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(16))]
    parts = [
        "a",
        " ",
        ".",
        "'",
        "n",
        "t",
        "é",
        "😀",
        "€",
        "\ufffd",
        "\n",
        *CONTRACTIONS,
        *(f" {part}" for part in CONTRACTIONS),
    ]
    text = "".join(draw.choice(parts) for _ in range(draw.randrange(14)))
    if "Ġ" in tokenizer.get_vocab():
        names = bytes_to_unicode()
    elif "<0x00>" in tokenizer.get_vocab():
        letters = {byte: chr(byte) for byte in range(33, 127) if draw.random() < 0.8}
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)} | {32: "▁"} | letters
    else:
        return tokenizer(text).input_ids
    return tokenizer.convert_tokens_to_ids([names[byte] for byte in text.encode() if draw.random() < 0.9])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_as_they_come_are_together_what_transformers_decodes(name: str) -> None:
    """Of all tokens, special ones left out, beyond what it decodes of the prompt; as its pipeline has it."""
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    for _ in range(400):
        ids = draw_ids(tokenizer, draw)
        prompt = ids[: draw.randrange(len(ids) + 1)]
        before, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (prompt, ids))
        assert "".join(decode_stream(tokenizer, prompt, ids[len(prompt) :])) == whole[len(before) :], (prompt, ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_what_comes_after_the_last_whole_character_is_not_lost(make: type[PreTrainedTokenizerFast]) -> None:
    """An emoji that the last token cuts, and a bad byte, are the replacement character.

    Words after and in the same token stay.
    """
    tokenizer = make()
    names = bytes_to_unicode() if make is byte_level else {byte: f"<0x{byte:02X}>" for byte in range(256)}
    emoji = tokenizer.convert_tokens_to_ids([names[byte] for byte in "😀".encode()])
    letter = tokenizer.convert_tokens_to_ids("a")
    assert "".join(decode_stream(tokenizer, [letter], [letter, *emoji[:2]])).rstrip("\ufffd") == "a"
    assert "".join(decode_stream(tokenizer, [letter], [letter, *emoji[:2]])) != "a"
    assert list(decode_stream(tokenizer, [letter], [*emoji, letter])) in (["😀", "a"], ["😀a"])
    assert "".join(decode_stream(tokenizer, [letter], [emoji[1], letter, letter])) == "\ufffdaa"


def test_pieces_come_as_soon_as_no_token_can_change_them() -> None:
    tokenizer = byte_level()
    taken: list[int] = []

    def tokens() -> Iterator[int]:
        for token in tokenizer("héllo").input_ids:
            taken.append(token)
            yield token

    assert [(piece, len(taken)) for piece in decode_stream(tokenizer, [], tokens())] == [
        ("h", 1),
        ("é", 3),
        ("l", 4),
        ("l", 5),
        ("o", 6),
    ]
