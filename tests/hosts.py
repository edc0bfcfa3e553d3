"""The table of hosts for tests: a tiny model of each, whose FFNs a mixture of ours replaces.

A new host is one row here. `test_hosts.py` asks every row about its tensors, its function and its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
IMAGES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class HostRow:
    """A tiny model: its class and its config's values.

    shape: what is special about its FFN or its surroundings; one of each shape is tested by default.
    more: other classes of the family that are tested where all families are.
    """

    architecture: str
    values: Mapping[str, Any]
    shape: str
    more: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def make(self, architecture: str | None = None) -> PreTrainedModel:
        """A model with random weights, in evaluation mode."""
        model_class: Callable[..., Any] = getattr(transformers, architecture or self.architecture)
        made: PreTrainedModel = model_class(model_class.config_class(**self.values)).eval()
        return made


ROWS: dict[str, HostRow] = {
    "bert": HostRow(
        "BertForMaskedLM",
        ENCODER,
        "split over two modules",
        more=("BertModel", "BertForTokenClassification", "BertForSequenceClassification", "BertForQuestionAnswering"),
    ),
    "gpt2": HostRow(
        "GPT2LMHeadModel",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCABULARY},
        "Conv1D",
    ),
    "vit": HostRow("ViTForImageClassification", IMAGES, "images", more=("ViTModel",)),
}
