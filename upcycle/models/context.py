"""How much of a text a model reads, and from which sides."""

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


def count_vocabulary(config: Any) -> int:
    """Rows of the token table; 0 of images and sound."""
    return int(getattr(config.get_text_config(), "vocab_size", 0))


def is_causal(config: Any) -> bool:
    """Whether tokens see earlier ones alone, as in most decoders.

    Since transformers 5.2 a decoder whose config has `is_causal` false reads in both directions; and so does a head for
    the next token on an encoder (BertLMHeadModel) whose config does not say `is_decoder`.
    """
    host = find_host(config.model_type)
    if host is not None and host.reads_both_ways and not getattr(config, "is_decoder", False):
        return False
    return getattr(config, "is_causal", None) is not False
