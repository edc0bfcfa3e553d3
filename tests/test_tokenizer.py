"""A tokenizer that cannot be loaded, fails, or does not fit the model is one line before any work."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from told import tells
from transformers import AutoTokenizer

from dense2moe.upcycle.checkpoints.tokenizer import check_ids, encode, load_tokenizer
from dense2moe.upcycle.data.blocks import check_data
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.errors import UpcycleError

Change = Callable[[dict[str, Any]], Any]
RESTORE = "download the tokenizer's files again, or put the model's own tokenizer.json there"


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture
def copy(dense_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))


def change(file: Path, edit: Change) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    edit(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def test_an_added_token_beyond_the_embedding_is_refused_with_the_way_to_resize(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(copy)
    assert refusal(check_ids, load_tokenizer(copy), 300, "text") == (
        f"{copy}: token '<pad>' has the id 300; the model's embedding has 300 rows, for ids up to 299; load the "
        "model, call "
        "resize_token_embeddings(301) and save it with its tokenizer, or remove the added token"
    )
    check_ids(load_tokenizer(copy), 301, "text")


def test_an_id_that_the_tokenizer_puts_around_a_text_is_compared_too(copy: Path) -> None:
    """The template of special tokens has ids of its own, which are in no vocabulary."""
    change(copy / "tokenizer.json", lambda j: j["post_processor"]["special_tokens"]["<s>"].update(ids=[7_000_000]))
    assert "the tokenizer gives the id 7000000; the model's embedding has 300 rows" in refusal(
        check_ids, load_tokenizer(copy), 300, "text"
    )


def test_a_tokenizer_without_a_vocabulary_is_refused(copy: Path) -> None:
    """transformers makes one, which gives no tokens for any text."""
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (copy / "vocab.json").write_text("{}")
    (copy / "merges.txt").write_text("")
    assert refusal(check_ids, load_tokenizer(copy), 300, "a text") == (
        f"{copy}: the tokenizer gives no tokens for 'a text', as if it had no vocabulary; {RESTORE}"
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not valid JSON ("), ("[1]", "holds list; it must hold a JSON object; ")]
)
def test_a_damaged_small_file_is_named(name: str, text: str, reason: str, copy: Path) -> None:
    (copy / name).write_text(text)
    assert refusal(load_tokenizer, copy).startswith(f"{copy / name}: {reason}")


@pytest.mark.parametrize(
    "edit",
    [
        lambda j: j.pop("model"),
        lambda j: j["model"].update(vocab=7),
        lambda j: j["model"].update(merges=[["x", "never"]]),
        lambda j: j.update(model={"type": "WordPiece"}),
        lambda j: j.update(post_processor={"type": "Nonesuch"}),
    ],
)
def test_a_damaged_tokenizer_is_named(edit: Change, copy: Path) -> None:
    change(copy / "tokenizer.json", edit)
    message = refusal(load_tokenizer, copy)
    assert message.startswith(f"{copy / 'tokenizer.json'}: transformers cannot load the tokenizer (")
    assert message.endswith(f"); {RESTORE}")


def test_a_fault_of_the_files_beside_tokenizer_json_is_not_called_its_own(copy: Path) -> None:
    change(copy / "tokenizer_config.json", lambda j: j.update(truncation_side="middle"))
    message = refusal(load_tokenizer, copy)
    assert message.startswith(f"{copy}: transformers cannot load the tokenizer (ValueError: Truncation side should be ")
    assert message.endswith(f"); {RESTORE}")


def test_a_config_of_a_tokenizer_without_its_vocabulary_is_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert (
        refusal(load_tokenizer, copy)
        == f"{copy}: no tokenizer that transformers can load; put the model's own tokenizer.json there"
    )


def test_a_panic_of_rust_in_the_tokenizer_is_one_line(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`BaseException`s that are no `Exception`s: here a template names a token that it does not describe."""

    class Panicking:
        name_or_path = str(copy)

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise BaseException("index out of bounds:\n the len is 0")

    assert refusal(encode, Panicking(), "text") == (
        f"{copy}: the tokenizer fails on a text (BaseException: index out of bounds: the len is 0); {RESTORE}"
    )


def test_a_tokenizer_of_code_is_never_asked_for(copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    change(
        copy / "tokenizer_config.json",
        lambda j: j.update(auto_map={"AutoTokenizer": [None, "mine.Mine"]}, tokenizer_class="Mine"),
    )
    (copy / "mine.py").write_text("raise SystemExit('run')")
    assert "transformers cannot load the tokenizer (" in refusal(load_tokenizer, copy)


def test_a_sentencepiece_model_alone_says_which_package_it_needs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "sentencepiece" else found(name, *rest)
    )
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"\x0a\x05junk")
    assert refusal(load_tokenizer, copy).endswith(
        "; tokenizer.model needs the package sentencepiece: `pip install sentencepiece`, or put the model's own "
        "tokenizer.json there"
    )


def test_text_for_less_than_a_block_in_any_split_is_told_before_any_work(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("Doors and gardens. " * 100)
    (tmp_path / "short.txt").write_text("A door and its garden, seven houses.")
    source = TextData(kind="text", train=("long.txt",), validation=("long2.txt",), test=("short.txt",))
    (tmp_path / "long2.txt").write_text("Owners and keepers. " * 100)
    config = DataConfig(source=source, block_size=64)
    said = refusal(check_data, dense_checkpoint, config, tmp_path, 300)
    assert tells(said, "data: the test split", "64", "block_size")
    check_data(dense_checkpoint, config.model_copy(update={"block_size": 8}), tmp_path, 300)


def test_a_text_that_git_lfs_did_not_fetch_is_told(dense_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n")
    config = DataConfig(source=TextData(kind="text", train=("t.txt",)), block_size=8)
    assert refusal(check_data, dense_checkpoint, config, tmp_path, 300).startswith(
        f"{tmp_path / 't.txt'}: is a git-LFS pointer, not the file itself; "
    )
