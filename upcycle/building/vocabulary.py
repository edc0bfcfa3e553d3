"""Whether a source's tokenizer, chat template and generation settings fit the base's.

The mixture has the base's. Another vocabulary would feed an expert other tokens than it was trained on, so it is
refused; whatever else differs is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from dense2moe.upcycle.building.agreement import TOLD_FIELDS
from dense2moe.upcycle.building.receipt_text import read_prose
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME, Checkpoint
from dense2moe.upcycle.checkpoints.tokenizer import encode, has_tokenizer, load_tokenizer
from dense2moe.upcycle.errors import UpcycleError, one_line_errors, shorten

_BOOKKEEPING = ("transformers_version", "_from_model_config")


def compare_companions(base: Checkpoint, where: str, source: Checkpoint) -> Iterator[str]:
    """Differences of a source that are told, a line each.

    `where` names the source in them.

    Raises:
        UpcycleError: the tokenizers differ: the first token, with its ids; or the first text that is cut otherwise.
    """
    for field in TOLD_FIELDS:
        found, own = (getattr(checkpoint.config, field, None) for checkpoint in (source, base))
        if found != own:
            yield f"{where}: {field} is {shorten(found)}; the mixture has the base's, {shorten(own)}"
    if has_tokenizer(source.directory) and has_tokenizer(base.directory):
        yield from _compare_tokenizers(load_tokenizer(base.directory), load_tokenizer(source.directory), where)
    found, own = _read_generation(source.directory), _read_generation(base.directory)
    if found is None or own is None:
        return
    for key in sorted((found.keys() | own.keys()) - set(_BOOKKEEPING)):
        if found.get(key) != own.get(key):
            yield (
                f"{where}: {GENERATION_CONFIG_NAME} says {key} {shorten(found.get(key))}; the mixture has the base's, "
                f"{shorten(own.get(key))}"
            )


def _compare_tokenizers(base: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, where: str) -> Iterator[str]:
    place = f"{where} ({source.name_or_path})"
    if (difference := _find_difference(base.get_vocab(), source.get_vocab())) is not None:
        raise UpcycleError(
            f"{place}: {difference}; sources must have the base's tokens under the same ids; give sources trained "
            "without added tokens"
        )
    text = read_prose()
    pairs = zip(encode(base, text, special=False), encode(source, text, special=False), strict=False)
    if (number := next((place for place, (one, other) in enumerate(pairs) if one != other), None)) is not None:
        raise UpcycleError(
            f"{place}: its tokenizer cuts one text otherwise than the base's, from token {number} on; sources must "
            "have the base's tokenizer"
        )
    if encode(base, "a") != encode(source, "a"):
        yield f"{where}: its tokenizer puts other special tokens around a text; the mixture has the base's"
    if base.chat_template != source.chat_template:
        own = "the base has none" if base.chat_template is None else "the mixture has the base's"
        yield f"{where}: its chat template is another one; {own}"


def _find_difference(base: Mapping[str, int], source: Mapping[str, int]) -> str | None:
    """The first token, by id, that one of two vocabularies has otherwise."""
    if base == source:
        return None
    wrong = {token for token in base.keys() | source.keys() if base.get(token) != source.get(token)}
    token = min(wrong, key=lambda each: (min(ids.get(each, len(base)) for ids in (base, source)), each))
    found, own = (f"has the id {ids[token]}" if token in ids else "is not there" for ids in (source, base))
    return f"token '{shorten(token)}' {found}; in the base it {own}"


def _read_generation(directory: Path) -> dict[str, Any] | None:
    path = directory / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    with one_line_errors(path, "transformers cannot read these settings for generation", "correct the file"):
        found: dict[str, Any] = GenerationConfig.from_pretrained(directory, local_files_only=True).to_diff_dict()
    return found
