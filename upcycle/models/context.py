"""How long a text a model can read."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.models.table import find_host

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_WITHOUT_END = 2048
"""Tokens, of a model that tells no length, such as BLOOM, whose positions have no end: what it was trained on."""


def find_context(config: Any) -> int:
    """The most tokens of one text.

    Where positions begin behind the padding's (RoBERTa), the table of positions has so many more.
    """
    text = config.get_text_config()
    size = next((int(value) for name in _FIELDS if (value := getattr(text, name, None))), _WITHOUT_END)
    host = find_host(config.model_type)
    begins = (getattr(text, "pad_token_id", None) or 0) + 1 if host is not None and host.counts_past_padding else 0
    return size - begins
