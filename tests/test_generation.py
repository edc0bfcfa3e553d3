"""Generation settings: what a package says of them is what transformers reads there, and options go before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import byte_level
from transformers import MixtralConfig

from dense2moe.export.errors import ExportError
from dense2moe.export.package import genai_config
from dense2moe.export.runtime.generation import Generation, read_generation
from dense2moe.export.runtime.sampling import Sampling

Write = Any


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**files: Any) -> Path:
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(
                values if isinstance(values, str) else json.dumps(values), encoding="utf-8"
            )
        return tmp_path

    return write


CONFIG = {"model_type": "llama", "bos_token_id": 3, "eos_token_id": 4}


@pytest.mark.parametrize(
    ("files", "start", "ends"),
    [
        ({"config": CONFIG, "generation_config": {"bos_token_id": 5, "eos_token_id": [6, 7]}}, 5, (6, 7)),
        ({"config": CONFIG, "generation_config": {"eos_token_id": 0}}, 3, (0,)),
        ({"config": CONFIG, "generation_config": {"do_sample": True}}, 3, (4,)),
        ({"config": CONFIG | {"eos_token_id": [4, 8]}}, 3, (4, 8)),
        ({"config": {"model_type": "llama"}}, 0, (1,)),  # what the tokenizer says
        ({"config": {"model_type": "llama", "bos_token_id": None, "eos_token_id": None}}, 0, (1,)),
        ({"genai_config": {"model": {"bos_token_id": 9, "eos_token_id": [10, 11]}}}, 9, (10, 11)),
        ({"config": CONFIG, "genai_config": {"model": {"bos_token_id": 9, "eos_token_id": 10}}}, 3, (4,)),
        ({}, 0, (1,)),
    ],
)
def test_a_text_ends_where_the_first_file_that_knows_says(
    write: Write, files: dict[str, Any], start: int, ends: tuple[int, ...]
) -> None:
    directory = write(**files)
    tokenizer = byte_level()
    found = read_generation(directory, tokenizer)
    assert (found.start, found.ends) == (start, ends)
    tokenizer.save_pretrained(directory)
    assert read_generation(directory).ends == ends


def test_no_token_that_starts_a_text_ends_one(write: Write) -> None:
    assert read_generation(
        write(config=CONFIG, generation_config={"bos_token_id": 0, "eos_token_id": 1}), byte_level()
    ).ends == (1,)


def test_a_package_that_says_nothing_ends_nowhere(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == Generation(sampling=Sampling(temperature=1.0, top_k=50))


def test_settings_that_are_not_followed_are_named(write: Write) -> None:
    settings = {
        "num_beams": 4,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": [],
        "typical_p": 1.0,
        "bad_words_ids": [[3, 4]],
        "min_length": 0,
    }
    assert read_generation(write(config=CONFIG, generation_config=settings)).strange == (
        "num_beams 4",
        "bad_words_ids [[3, 4]]",
    )


LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
QWEN = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({}, {}, Sampling()),
        (LLAMA, {}, Sampling(0.6, 50, 0.9)),
        (QWEN, {}, Sampling(0.7, 20, 0.8, repetition_penalty=1.1)),
        (QWEN, {"temperature": 0.0}, Sampling(repetition_penalty=1.1)),  # as with do_sample=False in transformers
        (QWEN, {"temperature": 0.0, "top_k": 5, "repetition_penalty": 1.0}, Sampling()),
        (QWEN, {"top_k": 0, "seed": 3}, Sampling(0.7, 0, 0.8, 3, repetition_penalty=1.1)),
        (QWEN | {"do_sample": False}, {}, Sampling(repetition_penalty=1.1)),
        (QWEN | {"do_sample": False}, {"top_p": 0.5}, Sampling(0.7, 20, 0.5, repetition_penalty=1.1)),
        ({}, {"temperature": 0.7}, Sampling(0.7, 50)),
        ({}, {"top_k": 40}, Sampling(1.0, 40)),
        ({}, {"min_p": 0.1}, Sampling(1.0, 50, min_p=0.1)),
        ({"min_p": 0.05, "do_sample": True}, {}, Sampling(1.0, 50, min_p=0.05)),
        ({"do_sample": True, "temperature": 0.0}, {}, Sampling()),
        ({"temperature": None, "top_k": None, "top_p": None, "do_sample": True}, {}, Sampling(1.0, 50)),
    ],
)
def test_tokens_are_chosen_as_transformers_would_unless_an_option_says_otherwise(
    write: Write, settings: dict[str, Any], options: dict[str, Any], expected: Sampling
) -> None:
    found = read_generation(write(config=CONFIG, generation_config=settings))
    assert found.choose_sampling(**options) == expected


def test_the_number_of_tokens_is_the_file_s_where_it_says_one(write: Write) -> None:
    assert read_generation(write(config=CONFIG, generation_config={"max_new_tokens": 20})).max_new_tokens == 20
    assert read_generation(write(generation_config={"max_length": 20})).max_new_tokens is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": "{"}, "generation_config.json: transformers cannot read it ("),
        ({"generation_config": "[]"}, "generation_config.json: transformers cannot read it ("),
        ({"config": "{"}, "config.json: transformers cannot read it ("),
        ({"genai_config": "[]"}, "genai_config.json: cannot be read ("),
        ({"genai_config": '{"model": 3}'}, "genai_config.json: cannot be read ("),
        (
            {"generation_config": {"temperature": "hot"}},
            "generation_config.json: temperature is 'hot'; must be a number of 0 or more; ",
        ),
        (
            {"generation_config": {"top_p": 3}},
            "generation_config.json: top_p is 3; must be a number of 0 or more and at most 1; ",
        ),
        (
            {"generation_config": {"repetition_penalty": 0}},
            "generation_config.json: repetition_penalty is 0; must be a number above 0; ",
        ),
        (
            {"generation_config": {"max_new_tokens": True}},
            "generation_config.json: max_new_tokens is True; must be a whole number of 1 or more; ",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(write: Write, files: dict[str, Any], message: str) -> None:
    directory = write(**files)
    with pytest.raises(ExportError) as caught:
        read_generation(directory)
    assert str(caught.value).startswith(f"{directory}/{message}")
    assert "\n" not in str(caught.value)


def test_genai_is_told_the_same(write: Write) -> None:
    config = MixtralConfig(vocab_size=300, max_position_embeddings=131_072, eos_token_id=2)
    generation = read_generation(write(generation_config=QWEN | {"eos_token_id": [1, 5], "top_k": 0}))
    found = genai_config(config, True, generation)
    assert found["model"]["eos_token_id"] == [1, 5]
    assert found["model"]["context_length"] == 131_072
    assert found["search"] == {
        "max_length": 4096,
        "past_present_share_buffer": True,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 300,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
    }
    greedy = genai_config(
        config, True, read_generation(write(generation_config={"temperature": 0.7, "eos_token_id": 5}))
    )
    assert (greedy["model"]["eos_token_id"], greedy["search"]["do_sample"], "top_k" in greedy["search"]) == (
        5,
        False,
        False,
    )
