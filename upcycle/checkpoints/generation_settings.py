"""Settings of generation beside a checkpoint: what transformers refuses or passes over.

transformers reads any JSON object and looks at most values when a text is generated: a checkpoint with a wrong one
would go through every stage and fail its user. So they are looked at first:

1. A value of the wrong type, or outside the setting's range, is refused: `generate` fails on most of them, and passes
   over some (`top_p: 3`), which say that the file is wrong.
2. A name that transformers does not know, which it passes over, and a token id outside the vocabulary, at which no text
   ends, are told.

Sources: `GenerationConfig.validate`, and the constructors in generation/logits_process.py, transformers 5.23.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME
from dense2moe.upcycle.errors import MendableError, UpcycleError, one_line_errors, shorten


@dataclass(frozen=True)
class _Number:
    """The numbers that a setting may be: from `least` to `most`.

    Or above `least`, where `least` itself is not allowed.
    """

    least: float = 0
    most: float = math.inf
    is_whole: bool = False
    is_above: bool = False

    def has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            return False
        return math.isfinite(value) and self.least <= value <= self.most and not (self.is_above and value == self.least)

    def __str__(self) -> str:
        what = "a whole number" if self.is_whole else "a number"
        if self.least == -math.inf:
            return what
        most = f" and at most {self.most:g}" if self.most < math.inf else ""
        return f"{what} above {self.least:g}{most}" if self.is_above else f"{what} of {self.least:g} or more{most}"


_ANY, _SHARE = _Number(-math.inf), _Number(most=1)
_COUNT, _LENGTH = _Number(1, is_whole=True), _Number(is_whole=True)
_NUMBERS: Mapping[str, _Number] = {
    "temperature": _Number(),  # 0, which transformers refuses where it draws, is greedy here as in other clients
    "top_k": _LENGTH,
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": _Number(0, 1, is_above=True),
    "typical_p": _Number(0, 1, is_above=True),
    "repetition_penalty": _Number(is_above=True),
    "no_repeat_ngram_size": _LENGTH,
    "max_length": _COUNT,
    "max_new_tokens": _COUNT,
    "min_length": _LENGTH,
    "min_new_tokens": _LENGTH,
    "num_beams": _COUNT,
    "num_return_sequences": _COUNT,
    **dict.fromkeys(("length_penalty", "guidance_scale", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), _ANY),
}
_SWITCHES = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_OLD = ("transformers_version", "_from_model_config", "_commit_hash")
"""Names that are no settings, and stand in files that transformers wrote."""


def check_generation_config(directory: Path, vocab_size: int) -> tuple[str, ...]:
    """Refuse a checkpoint's generation settings that transformers cannot use.

    Returns a line for each setting that transformers passes over.

    Raises:
        UpcycleError: the first that it cannot use, or what transformers says of the file.
    """
    path = directory / GENERATION_CONFIG_NAME
    if not path.is_file():
        refuse_values(directory / CONFIG_NAME)  # which then says how texts are drawn
        return ()
    with one_line_errors(
        path, "transformers cannot read these settings for generation", "correct the file, or remove it"
    ):
        refuse_values(path)
        GenerationConfig.from_pretrained(directory, local_files_only=True)
        return tuple(f"{path}: {line}" for line in _find_passed_over(_read_values(path), vocab_size))


def refuse_values(path: Path, kind: type[MendableError] = UpcycleError) -> None:
    """Refuse settings with a value of wrong type or range.

    `path` is the file of settings. A file that is no JSON object is left to transformers to refuse.

    Raises:
        MendableError: of this `kind`, for the first of them.
        OSError: the file cannot be read.
    """
    for name, value, must in _find_wrong(_read_values(path)):
        raise kind(f"{path}: {name} is {shorten(repr(value))}; must be {must}; correct it, or leave it out")


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _find_wrong(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Wrong values: name, value, what it must be.

    None is always allowed: it is the default.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _NUMBERS and not _NUMBERS[name].has(value):
            yield name, value, str(_NUMBERS[name])
        elif name in _SWITCHES and not isinstance(value, bool):
            yield name, value, "true or false"
        elif name in (*_TOKENS, *_FORCED) and not _are_whole(_as_list(value)):
            yield name, value, "a token's id, or a list of ids"
        elif name in _LISTS and not (isinstance(value, list) and _are_whole(value)):
            yield name, value, "a list of tokens' ids"


def _find_passed_over(values: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    known = vars(GenerationConfig()).keys() | {*_OLD}
    for name in values:
        if name not in known:
            meant = difflib.get_close_matches(name, known, 1)
            yield f"transformers knows no setting {name!r}" + (f"; did you mean {meant[0]}?" if meant else "")
    for name in _TOKENS:
        ids = [] if values.get(name) is None else _as_list(values[name])
        if strange := [token for token in ids if not 0 <= token < vocab_size]:
            yield (
                f"{name} has {', '.join(map(str, strange))}, and the vocabulary ids from 0 to {vocab_size - 1}; "
                "correct it, or leave it out"
            )


def _are_whole(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
