"""Whether a source is fine-tuned from the base: config and shapes.

Sources of one mixture share everything but their weights: a norm's epsilon, a rotary embedding or an activation of
another source's would make an expert compute something else than the model that it was trained in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from dense2moe.upcycle.building.target_config import derive_fields
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import COMMON_NEUTRAL

TOLD_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Read by generation, or bounds of the text: a fine-tuned model may have its own, which are told."""

_TRAINING_FIELDS = ("use_cache", "initializer_range", "attention_dropout")
"""Read by training or a cache alone."""


def check_agreement(base: Checkpoint, name: str, source: Checkpoint, conversion: Conversion) -> None:
    """Refuse a source that is not fine-tuned from the base.

    Raises:
        UpcycleError: the first field of config that differs, with both values, or the first tensor that one lacks or
            has in another shape.
    """
    where = f"sources.{name} ({source.directory})"
    if source.config.model_type != base.config.model_type:
        raise _refusal(where, "model_type", source.config.model_type, base.config.model_type)
    fields: Iterable[str] = (*conversion.carried, *conversion.required, *conversion.consumed, *conversion.optional)
    if conversion.keeps_rest:  # no table says which fields the forward pass reads, so each may be one
        fields = [
            field for field in {**base.config.to_dict(), **source.config.to_dict()} if field not in COMMON_NEUTRAL
        ]
    free = _free_fields(base)
    for field in dict.fromkeys(fields):
        if field in free:
            continue
        found, must = (_plain(getattr(side.config, field, None)) for side in (source, base))
        if found != must:
            raise _refusal(where, field, found, must)
    for tensor, entry in base.entries.items():
        if tensor in source.entries and source.entries[tensor].shape != entry.shape:
            raise _refusal(where, f"the shape of '{tensor}'", list(source.entries[tensor].shape), list(entry.shape))


def check_mixture_agreement(mixture: Checkpoint, source: Checkpoint, conversion: Conversion) -> None:
    """Refuse a source that is not of a finished mixture's base.

    The mixture's config must say what would be carried over from the source's, or derived from it.

    Raises:
        UpcycleError: the first field of config that differs, with both values.
    """
    where = str(source.directory)
    free = {*_free_fields(mixture), "tie_word_embeddings"}  # the head is no part of an FFN
    for field, found in derive_fields(source.config, conversion, where).items():
        if field not in free and found != (must := getattr(mixture.config, field, None)):
            raise _refusal(where, field, found, must, "mixture")


def _plain(value: Any) -> Any:
    """A config's value; of an inner config, what it computes with."""
    if not isinstance(value, PreTrainedConfig):
        return value
    return {name: _plain(each) for name, each in value.to_dict().items() if name not in COMMON_NEUTRAL}


def _free_fields(base: Checkpoint) -> set[str]:
    """Config fields in which a source may differ."""
    free = {*TOLD_FIELDS, *_TRAINING_FIELDS}
    if (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        free.discard("max_position_embeddings")  # of which other rotary embeddings compute their angles
    return free


def _refusal(where: str, what: str, found: Any, must: Any, of: str = "base") -> UpcycleError:
    return UpcycleError(
        f"{where}: {what} is {shorten(found)}; the {of} has {shorten(must)}; sources must be fine-tuned from the base, "
        "and differ from it in their weights alone"
    )
