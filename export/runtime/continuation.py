"""A package that continues prompts: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, overload

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import is_pair, load_tokenizer
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder
from dense2moe.export.runtime.encoder_decoder import EncoderDecoder
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
    """An ONNX package that writes text, with tokenizer and generation settings.

    It runs in onnxruntime. Any package whose inputs and outputs have our names will do: `input_ids`, `attention_mask`,
    `past_key_values.N.key` and `.value`, `logits`, `present.N.key` and `.value`. Of an encoder and a decoder, two
    graphs with optimum's names, a text is read, and what is written does not follow it but answers it.

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
        self.directory, provider = Path(directory), CUDA if device == "cuda" else CPU
        self._writer = EncoderDecoder(self.directory, provider) if is_pair(self.directory) else None
        if self._writer is not None and names.INPUT_IDS not in self._writer.encoder.inputs:
            raise ExportError(
                f"{self.directory}: reads {', '.join(self._writer.encoder.inputs)}, and no text; run it by optimum, or "
                "give a package that reads text"
            )
        self._decoder = None if self._writer is not None else Decoder(self.directory, provider)
        self._tokenizer = load_tokenizer(self.directory)
        self._generation = read_generation(self.directory, self._tokenizer)

    @property
    def continues(self) -> bool:
        """Whether it continues a prompt.

        Else it reads one text and writes another.
        """
        return self._decoder is not None

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its continuation together.

        Of an encoder and a decoder, the most tokens of what either reads.
        """
        runtime = self._decoder or self._writer
        assert runtime is not None
        return runtime.context_length

    @property
    def ignored_settings(self) -> tuple[str, ...]:
        """Generation settings that transformers follows and this class ignores.

        They stand in generation_config.json; beams are one.
        """
        followed = () if self.continues else ("forced_bos_token_id", "forced_eos_token_id")
        return tuple(setting for setting in self._generation.strange if setting.split()[0] not in followed)

    @overload
    def generate(self, prompts: str, config: GenerateConfig | None = None) -> str: ...

    @overload
    def generate(self, prompts: list[str], config: GenerateConfig | None = None) -> list[str]: ...

    def generate(self, prompts: str | list[str], config: GenerateConfig | None = None) -> str | list[str]:
        """The text that follows a prompt, or a list of prompts.

        Of an encoder and a decoder the text that answers it. The prompt itself is not part of it; a list of prompts
        gives a list of texts. Several prompts are one batch, and each is continued as it is alone, greedy or drawn.

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
            "".join(decode_stream(self._tokenizer, self._before(start, config), row))
            for start, row in zip(ids, rows, strict=True)
        ]
        return shown[0] if isinstance(prompts, str) else shown

    def stream(self, prompt: str, config: GenerateConfig | None = None) -> Iterator[str]:
        """The text of `generate`, in pieces as they come."""
        config = config or GenerateConfig()
        ids = self._encode(prompt, config)
        steps = self._steps([ids], config)  # here, so that a prompt is refused before a piece is asked for
        tokens = (token for (token,) in steps if token is not None)
        return decode_stream(self._tokenizer, self._before(ids, config), tokens)

    def _before(self, ids: list[int], config: GenerateConfig) -> list[int]:
        """The tokens that what is written follows."""
        return ids if self.continues and not config.chat else []

    def _encode(self, text: str, config: GenerateConfig) -> list[int]:
        if config.chat:
            return chat_ids(self._tokenizer, text)
        return start_ids(self._tokenizer, text, self._generation.start)

    def _steps(self, ids: Sequence[Sequence[int]], config: GenerateConfig) -> Iterator[tuple[int | None, ...]]:
        lengths = [len(row) for row in ids]
        room = self.context_length - max(lengths, default=0) + (0 if self.continues else 1)
        if room < 1:
            where = "the prompt" if len(ids) == 1 else f"prompt {lengths.index(max(lengths)) + 1}"
            raise ExportError(
                f"{where}: has {max(lengths)} tokens; the model's context holds {self.context_length}; shorten it"
            )
        sampling = self._generation.choose_sampling(
            config.seed, config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
        )
        most = config.max_new_tokens or self._generation.max_new_tokens or _NEW_TOKENS
        if self._writer is not None:
            return self._writer.generate(_pad(ids), sampling, min(most, self.context_length - 1), ids)
        assert self._decoder is not None
        return self._decoder.generate(ids, min(most, room), sampling, self._generation.ends)


def _pad(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows of tokens padded at their right, and their mask."""
    width = max(map(len, rows), default=0)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {names.INPUT_IDS: ids, names.ATTENTION_MASK: mask}
