"""A row of the table of hosts: a tiny model of one family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedModel

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 32, 64, 2, 4, 96
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class HostRow:
    """A tiny model: its class and its config's values.

    shape: what is special about its FFN or its surroundings; those that have one are tested by default.
    more: other classes of the family that are tested where all families are.
    refused: dtypes in which transformers does not run the dense model.
    """

    architecture: str
    values: Mapping[str, Any]
    shape: str = ""
    more: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def make(self, architecture: str | None = None, **values: Any) -> PreTrainedModel:
        """A model with random weights, in evaluation mode."""
        model_class: Callable[..., Any] = getattr(transformers, architecture or self.architecture)
        made: PreTrainedModel = model_class(model_class.config_class(**{**self.values, **values})).eval()
        return made
