"""A package of one pass, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dense2moe.export.opening import load_tokenizer
from dense2moe.upcycle.checkpoints.class_heads import find_padding
from dense2moe.upcycle.checkpoints.windows import Window
from dense2moe.upcycle.checkpoints.words import EncodedText, TextSpan, encode_text
from dense2moe.upcycle.models.context import find_context


class PassModel(Protocol):
    """What computes outputs by name of inputs by name."""

    def run(self, given: dict[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        """Outputs [B, ...] of inputs [B, ...]."""


@dataclass
class TextPass:
    """A package that reads texts, all of a batch at once."""

    directory: Path
    config: PreTrainedConfig
    model: PassModel
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    most_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.directory)
        self.most_tokens, self._padding = find_context(self.config), find_padding(self.config)

    def encode(self, text: str, pair: str | None = None, words: Sequence[TextSpan] = (), start: int = 0) -> EncodedText:
        """A text's tokens, as `encode_text` has them."""
        return encode_text(self.tokenizer, text, self.most_tokens, pair, words, start)

    def run(self, encoded: Sequence[EncodedText] | Sequence[Window]) -> dict[str, torch.Tensor]:
        """The outputs of some texts, padded on the right."""
        length = max(len(text.ids) for text in encoded)

        def pad(rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows])

        return self.model.run(
            {
                "input_ids": pad([text.ids for text in encoded], self._padding),
                "attention_mask": pad([[1] * len(text.ids) for text in encoded], 0),
                "token_type_ids": pad([text.types or (0,) * len(text.ids) for text in encoded], 0),
            }
        )
