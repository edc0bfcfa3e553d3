"""A package's generation settings: special tokens and sampling.

Where text starts and ends, how it is drawn. As transformers takes them: those of generation_config.json, or where there
is none, what config.json says of generation. A setting that is left out has transformers' default: greedy, and where
tokens are drawn, temperature 1 from the 50 likeliest (`_get_default_generation_params`, 5.23).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import GenerationConfig

from dense2moe.export.errors import ExportError
from dense2moe.export.opening import load_tokenizer
from dense2moe.export.runtime.sampling import Sampling
from dense2moe.export.storage import GENAI_CONFIG_NAME
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.generation_settings import refuse_values
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME
from dense2moe.upcycle.checkpoints.tokenizer import has_tokenizer
from dense2moe.upcycle.errors import one_line_errors

Number = TypeVar("Number", int, float)

_TOP_K = 50  # transformers' default where tokens are drawn
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "stop_strings": (),
    "watermarking_config": (),
    "dola_layers": (),
}
"""Settings of transformers that change a text and that we have not, each with its values that change nothing.

As none does.
"""


@dataclass(frozen=True)
class Generation:
    """A package's generation settings.

    start: the token that starts a text without tokens. ends: the tokens that end one. draws: whether tokens are drawn.
    max_new_tokens: tokens to write, where the file says so. sampling: how tokens are drawn, if they are; its seed is 0.
    strange: settings that change a text in transformers and not here, such as `num_beams 4`. Of an encoder and a
    decoder, the decoder_start: the token that it is given first; forced_first and forced_last: the token that it must
    write first, as the language of a translation, and the one that it must end with where it is cut.
    """

    start: int | None = None
    ends: tuple[int, ...] = ()
    draws: bool = False
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    strange: tuple[str, ...] = ()
    decoder_start: int | None = None
    forced_first: int | None = None
    forced_last: int | None = None

    def choose_sampling(
        self,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """The package's sampling, with the settings given here.

        Temperature 0 is greedy, and any other setting of the draw asks for one.
        """
        own = self.sampling
        draws = (
            temperature > 0
            if temperature is not None
            else self.draws or any(each is not None for each in (top_k, top_p, min_p))
        )
        penalty = own.repetition_penalty if repetition_penalty is None else repetition_penalty
        if not draws:
            return Sampling(repetition_penalty=penalty)
        return Sampling(
            temperature=own.temperature if temperature is None else temperature,
            top_k=own.top_k if top_k is None else top_k,
            top_p=own.top_p if top_p is None else top_p,
            seed=seed,
            min_p=own.min_p if min_p is None else min_p,
            repetition_penalty=penalty,
        )


def read_generation(directory: Path, tokenizer: Any = None) -> Generation:
    """Read the generation settings of a package or a checkpoint.

    `tokenizer` is its tokenizer, where that is loaded already. A text ends at the tokens that the first of these names:
    generation_config.json, config.json or, where there is none, genai_config.json, and the tokenizer.

    Raises:
        ExportError: one of these files cannot be read, or a setting is no number of its range.
    """
    names = [name for name in (GENERATION_CONFIG_NAME, CONFIG_NAME) if (directory / name).is_file()]
    read = [_read(directory, name, is_own=name == names[0]) for name in names]
    own = read[0] if read else GenerationConfig()
    starts, ends = [each.bos_token_id for each in read], [each.eos_token_id for each in read]
    if not (directory / CONFIG_NAME).is_file() and (directory / GENAI_CONFIG_NAME).is_file():
        model = _read_genai(directory / GENAI_CONFIG_NAME)
        starts.append(model.get("bos_token_id"))
        ends.append(model.get("eos_token_id"))
    found = next(filter(None, map(_as_ids, ends)), ())
    if tokenizer is None and not found and has_tokenizer(directory):
        tokenizer = load_tokenizer(directory)
    starts.append(getattr(tokenizer, "bos_token_id", None))
    sampling = Sampling(
        temperature=_default(own.temperature, 1.0),
        top_k=_default(own.top_k, _TOP_K),
        top_p=_default(own.top_p, 1.0),
        min_p=_default(own.min_p, 0.0),
        repetition_penalty=_default(own.repetition_penalty, 1.0),
    )
    return Generation(
        start=next((ids[0] for ids in map(_as_ids, starts) if ids), None),
        ends=found or _as_ids(getattr(tokenizer, "eos_token_id", None)),
        draws=bool(own.do_sample) and sampling.temperature > 0,
        max_new_tokens=own.max_new_tokens,
        sampling=sampling,
        strange=tuple(_find_strange(own)),
        decoder_start=_first_id(read, "decoder_start_token_id", "bos_token_id"),
        forced_first=_first_id(read[:1], "forced_bos_token_id"),
        forced_last=_first_id(read[:1], "forced_eos_token_id"),
    )


def _first_id(read: Sequence[GenerationConfig], *settings: str) -> int | None:
    """The first token that one of these settings names."""
    named = (_as_ids(getattr(each, setting, None)) for setting in settings for each in read)
    return next((ids[0] for ids in named if ids), None)


def _read(directory: Path, name: str, is_own: bool) -> GenerationConfig:
    """Settings of a file; `is_own`: all count, and not only the tokens."""
    with one_line_errors(
        directory / name, "transformers cannot read it", "copy it from the checkpoint again", ExportError
    ):
        if is_own:
            refuse_values(directory / name, ExportError)
        return GenerationConfig.from_pretrained(
            directory, config_file_name=name, local_files_only=True, _from_model_config=name == CONFIG_NAME
        )


def _read_genai(path: Path) -> dict[str, Any]:
    with one_line_errors(
        path, "cannot be read", "it must be onnxruntime-genai's description of the package", ExportError
    ):
        return dict(json.loads(path.read_text(encoding="utf-8"))["model"])


def _as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from one, a list or none; others are dropped."""
    ids = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(number for number in ids if type(number) is int and number >= 0))


def _default(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _find_strange(settings: GenerationConfig) -> Iterator[str]:
    for name, harmless in _NO_EFFECT.items():
        value = getattr(settings, name, None)
        if value is not None and value not in harmless:
            yield f"{name} {json.dumps(value, default=str)}"
