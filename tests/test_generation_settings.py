"""Generation settings beside a checkpoint: what cannot be used is refused, what is passed over is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import dense2moe
from transformers import AutoModelForCausalLM, GenerationConfig

from dense2moe.upcycle.checkpoints.generation_settings import check_generation_config
from dense2moe.upcycle.errors import UpcycleError

VOCABULARY = 300


def check(directory: Path, settings: object, name: str = "generation_config.json") -> tuple[str, ...]:
    (directory / name).write_text(json.dumps(settings), encoding="utf-8")
    return check_generation_config(directory, VOCABULARY)


WRONG: dict[str, tuple[Any, str]] = {
    "temperature": (-0.5, "a number of 0 or more"),
    "top_k": (2.5, "a whole number of 0 or more"),
    "top_p": (3, "a number of 0 or more and at most 1"),
    "min_p": (float("nan"), "a number of 0 or more and at most 1"),
    "top_h": (0, "a number above 0 and at most 1"),
    "typical_p": ("0.9", "a number above 0 and at most 1"),
    "repetition_penalty": (0.0, "a number above 0"),
    "no_repeat_ngram_size": (1.5, "a whole number of 0 or more"),
    "max_length": ("many", "a whole number of 1 or more"),
    "max_new_tokens": ("20", "a whole number of 1 or more"),
    "min_length": (-1, "a whole number of 0 or more"),
    "min_new_tokens": (True, "a whole number of 0 or more"),
    "num_beams": (0, "a whole number of 1 or more"),
    "num_return_sequences": ([2], "a whole number of 1 or more"),
    "length_penalty": ("1", "a number"),
    "do_sample": ("yes", "true or false"),
    "use_cache": (1, "true or false"),
    "bos_token_id": ("<s>", "a token's id, or a list of ids"),
    "eos_token_id": ([1, "</s>"], "a token's id, or a list of ids"),
    "pad_token_id": (0.0, "a token's id, or a list of ids"),
    "forced_eos_token_id": ({"id": 1}, "a token's id, or a list of ids"),
    "suppress_tokens": (3, "a list of tokens' ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_the_wrong_type_or_out_of_its_range_is_one_line(name: str, tmp_path: Path) -> None:
    value, must = WRONG[name]
    with pytest.raises(UpcycleError) as caught:
        check(tmp_path, {name: value})
    shown = repr(json.loads(json.dumps(value)))
    path = tmp_path / "generation_config.json"
    assert str(caught.value) == f"{path}: {name} is {shown}; must be {must}; correct it, or leave it out"


def test_what_transformers_refuses_of_the_file_is_one_line(tmp_path: Path) -> None:
    for settings in ({"early_stopping": "often"}, {"watermarking_config": {"colour": "green"}}, [], "hot"):
        with pytest.raises(UpcycleError, match="transformers cannot read these settings for generation") as caught:
            check(tmp_path, settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.5}, {"top_p": -0.1}, {"top_k": -2}, {"repetition_penalty": -1.0}]
)
def test_transformers_itself_generates_no_text_with_what_is_refused(
    settings: dict[str, Any], dense_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError):
        check(tmp_path, settings)
    model = AutoModelForCausalLM.from_pretrained(dense_checkpoint)
    with pytest.raises(ValueError, match="has to be"):
        model.generate(generation_config=GenerationConfig(do_sample=True, max_new_tokens=1, bos_token_id=0, **settings))


def test_usual_settings_and_defaults_pass_in_silence(tmp_path: Path) -> None:
    """As released checkpoints have them, with every default written out."""
    assert check(tmp_path, json.loads(GenerationConfig().to_json_string(use_diff=False))) == ()
    usual = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [2, 299],
        "max_length": 4096,
        "pad_token_id": 0,
        "repetition_penalty": 1,
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "transformers_version": "4.57.6",
    }
    assert check(tmp_path, usual) == ()


def test_without_the_file_the_settings_are_those_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"top_k": 20, "unknown": 1}', encoding="utf-8")
    assert check_generation_config(tmp_path, VOCABULARY) == ()
    with pytest.raises(UpcycleError, match=r"config\.json: top_k is 'x'; must be a whole number of 0 or more"):
        check(tmp_path, {"top_k": "x"}, "config.json")


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    settings = {"temprature": 0.3, "chat_format": "raw", "eos_token_id": [2, 300, 999], "pad_token_id": -1}
    assert check(tmp_path, settings) == (
        f"{path}: transformers knows no setting 'temprature'; did you mean temperature?",
        f"{path}: transformers knows no setting 'chat_format'",
        f"{path}: eos_token_id has 300, 999, and the vocabulary ids from 0 to 299; correct it, or leave it out",
        f"{path}: pad_token_id has -1, and the vocabulary ids from 0 to 299; correct it, or leave it out",
    )


def test_check_and_run_say_what_is_passed_over(dense_checkpoint: Path, tmp_path: Path) -> None:
    source, recipe = tmp_path / "dense", tmp_path / "recipe.yaml"
    shutil.copytree(dense_checkpoint, source)
    (source / "generation_config.json").write_text('{"temprature": 1.0}', encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text number {number} of many." for number in range(200)))
    data = {"source": {"kind": "text", "train": ["text.txt"], "separator": "\n\n"}, "block_size": 32}
    recipe.write_text(json.dumps({"source": str(source), "data": data}), encoding="utf-8")
    line = f"{source}/generation_config.json: transformers knows no setting 'temprature'; did you mean temperature?\n"
    assert dense2moe("check", recipe).stdout.endswith(f"\n{line}")
    ran = dense2moe("run", recipe, "--workdir", tmp_path / "work", "--until", "source")
    assert f"! {line}" in ran.stderr
