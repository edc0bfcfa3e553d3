"""The licence that a checkpoint's own card names."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.repocard import metadata_load

from dense2moe.convert.report.names import CARD_NAME

_LICENSE_FIELDS = ("license", "license_name", "license_link")


def read_license(checkpoint: Path) -> dict[str, str]:
    """The licence in a checkpoint's card, by the hub's own fields.

    Empty where there is no card, or none that can be read.
    """
    card = checkpoint / CARD_NAME
    if not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except Exception:  # of yaml's many kinds; a card that cannot be read tells nothing, and spoils nothing
        return {}
    return {field: metadata[field] for field in _LICENSE_FIELDS if isinstance(metadata.get(field), str)}
