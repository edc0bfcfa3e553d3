"""A package that continues prompts: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, overload

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dense2moe.export.errors import ExportError
from dense2moe.export.opening import load_tokenizer
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder
from dense2moe.export.runtime.generation import read_generation
from dense2moe.export.runtime.text import chat_ids, decode_stream, start_ids
from dense2moe.export.variant import Device
from dense2moe.upcycle.record import NonNegative, Record

_NEW_TOKENS = 128  # where neither the caller nor the package says how many


class GenerateConfig(Record):
    """How a text is continued.

    What is None is as the package's generation_config.json says.
    """

    max_new_tokens: PositiveInt | None = Field(
        None, description="Tokens to write at most, as far as the context has room; 128 if the package says nothing."
    )
    temperature: NonNegative | None = Field(None, description="0 is greedy.")
    top_k: NonNegativeInt | None = Field(None, description="Draw from the k likeliest tokens; 0 is all of them.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Nucleus sampling: keep this probability mass."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Smallest probability of a token, as a share of the likeliest token's."
    )
    repetition_penalty: PositiveFloat | None = Field(None, description="1 is none.")
    seed: NonNegativeInt = Field(0, description="Seed of the draws.")
    chat: bool = Field(False, description="Each prompt is what a user says, in the tokenizer's chat template.")


class Package:
    """An ONNX decoder package, loaded with tokenizer and generation settings.

    It runs in onnxruntime. Any package whose inputs and outputs have our names will do: `input_ids`, `attention_mask`,
    `past_key_values.N.key` and `.value`, `logits`, `present.N.key` and `.value`.

    Args:
        directory: the package: `model.onnx`, its weights, tokenizer and configs.
        device: "cpu", or "cuda" with onnxruntime-gpu installed.

    Raises:
        ExportError: no package there, a damaged one, an onnxruntime older than it needs, or no such device.

    Example:
        package = Package("int8")
        text = package.generate("Licensed under", GenerateConfig(max_new_tokens=8))
        drawn = package.generate(["Licensed", "the work"], GenerateConfig(max_new_tokens=8, temperature=0.7, seed=1))
        for piece in package.stream("Licensed under", GenerateConfig(max_new_tokens=8)):
            print(piece, end="")
    """

    def __init__(self, directory: str | Path, device: Device = "cpu") -> None:
        self.directory = Path(directory)
        self._decoder = Decoder(self.directory, CUDA if device == "cuda" else CPU)
        self._tokenizer = load_tokenizer(self.directory)
        self._generation = read_generation(self.directory, self._tokenizer)

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        return self._decoder.context_length

    @property
    def ignored_settings(self) -> tuple[str, ...]:
        """Generation settings that transformers follows and this class ignores.

        They stand in generation_config.json; beams are one.
        """
        return self._generation.strange

    @overload
    def generate(self, prompts: str, config: GenerateConfig | None = None) -> str: ...

    @overload
    def generate(self, prompts: list[str], config: GenerateConfig | None = None) -> list[str]: ...

    def generate(self, prompts: str | list[str], config: GenerateConfig | None = None) -> str | list[str]:
        """The text that follows a prompt, or a list of prompts.

        The prompt itself is not part of it; a list of prompts gives a list of texts. Several prompts are one batch, and
        each is continued as it is alone, greedy or drawn.

        Raises:
            ExportError: a prompt has no tokens or more than the context holds, or there is no chat template.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        config = config or GenerateConfig()
        ids = [self._encode(text, config) for text in texts]
        rows: list[list[int]] = [[] for _ in ids]
        for step in self._steps(ids, config):
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        shown = [
            "".join(decode_stream(self._tokenizer, [] if config.chat else start, row))
            for start, row in zip(ids, rows, strict=True)
        ]
        return shown[0] if isinstance(prompts, str) else shown

    def stream(self, prompt: str, config: GenerateConfig | None = None) -> Iterator[str]:
        """The text of `generate`, in pieces as they come."""
        config = config or GenerateConfig()
        ids = self._encode(prompt, config)
        steps = self._steps([ids], config)  # here, so that a prompt is refused before a piece is asked for
        tokens = (token for (token,) in steps if token is not None)
        return decode_stream(self._tokenizer, [] if config.chat else ids, tokens)

    def _encode(self, text: str, config: GenerateConfig) -> list[int]:
        if config.chat:
            return chat_ids(self._tokenizer, text)
        return start_ids(self._tokenizer, text, self._generation.start)

    def _steps(self, ids: Sequence[Sequence[int]], config: GenerateConfig) -> Iterator[tuple[int | None, ...]]:
        lengths = [len(row) for row in ids]
        room = self.context_length - max(lengths, default=0)
        if room < 1:
            where = "the prompt" if len(ids) == 1 else f"prompt {lengths.index(max(lengths)) + 1}"
            raise ExportError(
                f"{where}: has {max(lengths)} tokens; the model's context holds {self.context_length}; shorten it"
            )
        sampling = self._generation.choose_sampling(
            config.seed, config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
        )
        most = config.max_new_tokens or self._generation.max_new_tokens or _NEW_TOKENS
        return self._decoder.generate(ids, min(most, room), sampling, self._generation.ends)
