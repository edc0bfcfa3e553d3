"""Tokenizers of checkpoints: loaded, asked, and held against the model.

What transformers, tokenizers and tiktoken raise here, panics of Rust among it, is one line that names the checkpoint's
files.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dense2moe.upcycle.checkpoints.config_files import TOKENIZER_CONFIG_NAME
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

TOKENIZER_NAME = "tokenizer.json"
_PATTERNS = (TOKENIZER_NAME, "*.model", "*.tiktoken", "tekken.json", "vocab.*", "vocab-*", "merges.txt")
"""The files that a tokenizer of transformers is read from; the others only describe it."""
_SMALL_NAMES = (TOKENIZER_CONFIG_NAME, "special_tokens_map.json", "added_tokens.json")
_CANNOT_LOAD = "transformers cannot load the tokenizer"
_RESTORE = f"download the tokenizer's files again, or put the model's own {TOKENIZER_NAME} there"


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a file that a tokenizer could be read from."""
    return any(path.is_file() for pattern in _PATTERNS for path in directory.glob(pattern))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint, as transformers loads it.

    No code of the checkpoint is run.

    Raises:
        UpcycleError: there is none, a file of it is damaged or asks for code, or a package is needed that is not
            installed.
    """
    if not has_tokenizer(directory):
        raise UpcycleError(
            f"{directory}: no tokenizer that transformers can load; put the model's own {TOKENIZER_NAME} there"
        )
    for name in _SMALL_NAMES:
        _check_json(directory / name)
    file = directory / TOKENIZER_NAME
    with one_line_errors(directory, _CANNOT_LOAD, _mend_loading(directory)):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception:
            if file.is_file():
                with one_line_errors(file, _CANNOT_LOAD, _RESTORE):  # where it is this file's fault
                    Tokenizer.from_file(str(file))
            raise
    return tokenizer


def _check_json(file: Path) -> None:
    """Refuse a small tokenizer file that holds no JSON object.

    transformers would not say which file it means.
    """
    if not file.is_file():
        return
    with one_line_errors(file, "not valid JSON", "restore the file"):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UpcycleError(f"{file}: holds {type(values).__name__}; it must hold a JSON object; restore the file")


def _mend_loading(directory: Path) -> str:
    """How to mend a tokenizer that cannot be loaded."""
    model = next((path.name for path in sorted(directory.glob("*.model"))), None)
    if model is None or (directory / TOKENIZER_NAME).is_file() or importlib.util.find_spec("sentencepiece"):
        return _RESTORE
    return (
        f"{model} needs the package sentencepiece: `pip install sentencepiece`, or put the model's own "
        f"{TOKENIZER_NAME} there"
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, with or without special tokens.

    The special tokens are those that the tokenizer puts around a text.

    Raises:
        UpcycleError: the tokenizer fails on the text.
    """
    with one_line_errors(Path(tokenizer.name_or_path), "the tokenizer fails on a text", _RESTORE):
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def check_ids(tokenizer: PreTrainedTokenizerBase, num_rows: int, sample: str) -> None:
    """Refuse a tokenizer whose ids exceed the embedding's `num_rows` rows.

    Or without tokens for a `sample` of the text.

    Raises:
        UpcycleError: the token, its id, and how to make the embedding larger.
    """
    directory = tokenizer.name_or_path
    token, largest = max(_read_vocabulary(tokenizer).items(), key=lambda pair: pair[1], default=("", -1))
    if largest >= num_rows:
        raise UpcycleError(
            f"{directory}: token '{shorten(token)}' has the id {largest}; the model's embedding has {num_rows} rows, "
            f"for ids up to {num_rows - 1}; "
            f"load the model, call resize_token_embeddings({largest + 1}) and save it with its tokenizer, or remove "
            "the added token"
        )
    ids = encode(tokenizer, sample)
    if (beyond := _find_beyond(ids, num_rows)) is not None:
        raise UpcycleError(
            f"{directory}: the tokenizer gives the id {beyond}; the model's embedding has {num_rows} rows; {_RESTORE}"
        )
    if sample.strip() and not encode(tokenizer, sample, special=False):
        raise UpcycleError(
            f"{directory}: the tokenizer gives no tokens for '{shorten(sample)[:40]}', as if it had no vocabulary; "
            f"{_RESTORE}"
        )


def _read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens in the tokenizer's own file.

    A class of transformers may add others of its family, which no text of this model holds.
    """
    file = Path(tokenizer.name_or_path) / TOKENIZER_NAME
    if not file.is_file():
        return tokenizer.get_vocab()
    vocabulary: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return vocabulary


def _find_beyond(ids: Iterable[int], num_rows: int) -> int | None:
    return next((number for number in ids if not 0 <= number < num_rows), None)
