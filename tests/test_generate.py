"""`dense2moe generate` follows the package's generation_config.json, and options go before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import dense2moe
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "the work"


def change(package: Path, folder: Path, generation: dict[str, Any], post_processor: bool = True) -> Path:
    """A copy of the package with these generation settings, and a tokenizer that puts a token before a text or none."""
    copy = folder / "changed"
    shutil.copytree(package, copy)
    (copy / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if not post_processor:
        values = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
        (copy / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}), encoding="utf-8")
    return copy


def generate(package: Path, *options: object, prompt: str = PROMPT) -> str:
    finished = dense2moe("generate", package, "--prompt", prompt, *options)
    assert (finished.exit_code, finished.stderr) == (0, ""), finished.output
    return finished.stdout


def expect(checkpoint: Path, package: Path, **options: Any) -> tuple[str, list[int]]:
    """What transformers writes with the checkpoint's weights and the package's tokenizer, and its tokens."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(package),
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    )
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], pad_token_id=1, **options)[0]
    return tokenizer.decode(tokens, skip_special_tokens=True) + "\n", tokens[inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("puts_start", [True, False])
def test_nothing_is_put_before_a_prompt_that_the_tokenizer_does_not_put(
    package: Path, mixture_checkpoint: Path, tmp_path: Path, puts_start: bool
) -> None:
    changed = change(package, tmp_path, {"bos_token_id": 0, "eos_token_id": 1}, puts_start)
    assert generate(changed, "--max-new-tokens", 12) == expect(mixture_checkpoint, changed, max_new_tokens=12)[0]


def test_a_text_ends_at_any_token_of_a_list_and_at_no_start(
    package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    _, free = expect(mixture_checkpoint, package, max_new_tokens=30, eos_token_id=None)
    place = next(n for n, token in enumerate(free) if n >= 8 and token not in free[:n])
    changed = change(
        package, tmp_path, {"bos_token_id": free[3], "eos_token_id": [1, free[place]], "max_new_tokens": 30}
    )
    text, tokens = expect(mixture_checkpoint, changed, max_new_tokens=30, eos_token_id=[1, free[place]])
    assert tokens == free[: place + 1]
    assert generate(changed) == text
    several = dense2moe("generate", changed, "--prompt", PROMPT, "--prompt", PROMPT)
    assert several.stdout == f"== 1 of 2\n{text}== 2 of 2\n{text}"


def test_the_number_of_tokens_and_the_penalty_are_the_package_s_unless_given(
    package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    changed = change(package, tmp_path, {"eos_token_id": 1, "max_new_tokens": 9, "repetition_penalty": 1.5})
    for options, expected in (
        ((), {"max_new_tokens": 9, "repetition_penalty": 1.5}),
        (("--max-new-tokens", 14, "--repetition-penalty", 1), {"max_new_tokens": 14, "repetition_penalty": 1.0}),
    ):
        assert generate(changed, *options) == expect(mixture_checkpoint, changed, **expected)[0]


def test_tokens_are_drawn_where_the_package_or_an_option_asks_for_it(package: Path, tmp_path: Path) -> None:
    draws = change(package, tmp_path, {"do_sample": True, "temperature": 0.9, "top_k": 30, "eos_token_id": 1})
    drawn = generate(package, "--temperature", 0.9, "--top-k", 30)
    assert generate(draws) == drawn
    assert generate(draws, "--temperature", 0) == generate(package) != drawn
    assert generate(package, "--top-k", 50) == generate(package, "--temperature", 1) != generate(package)
    assert generate(package, "--top-k", 1) == generate(package, "--temperature", 1, "--min-p", 1) == generate(package)


def test_settings_that_are_not_followed_are_one_line_beside_the_text(package: Path, tmp_path: Path) -> None:
    changed = change(package, tmp_path, {"num_beams": 4, "eos_token_id": 1})
    finished = dense2moe("generate", changed, "--prompt", PROMPT)
    assert (
        finished.stderr == f"{changed}: generation_config.json has settings that are not followed here: num_beams 4\n"
    )
    assert finished.stdout == generate(package)


def test_an_empty_prompt_is_the_token_that_starts_a_text(package: Path, tmp_path: Path) -> None:
    started = generate(package, "--max-new-tokens", 8, prompt="")
    changed = change(package, tmp_path, {"bos_token_id": 0, "eos_token_id": 1}, post_processor=False)
    assert generate(changed, "--max-new-tokens", 8, prompt="") == started
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((changed / name).read_text(encoding="utf-8"))
        (changed / name).write_text(json.dumps(values | {"bos_token_id": None, "bos_token": None}), encoding="utf-8")
    finished = dense2moe("generate", changed, "--prompt", "")
    assert (finished.exit_code, finished.stderr) == (1, "Error: the prompt has no tokens; give some text\n")


def test_a_chat_prints_the_answer_alone(package: Path, tmp_path: Path) -> None:
    changed = change(package, tmp_path, {"eos_token_id": 1}, post_processor=False)
    (changed / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    assert PROMPT + generate(changed, "--chat") == generate(package)
    finished = dense2moe("generate", package, "--prompt", PROMPT, "--chat")
    assert (
        finished.stderr
        == f"Error: {package}: the tokenizer has no chat template; add one, or prompt without the chat option\n"
    )


def test_generation_settings_that_cannot_be_read_are_one_line(package: Path, tmp_path: Path) -> None:
    changed = change(package, tmp_path, {})
    (changed / "generation_config.json").write_text("{", encoding="utf-8")
    finished = dense2moe("generate", changed, "--prompt", PROMPT)
    assert (finished.exit_code, finished.stderr.count("\n")) == (1, 1)
    assert finished.stderr.startswith(f"Error: {changed / 'generation_config.json'}: transformers cannot read it (")
