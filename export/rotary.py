"""Rotary embeddings of transformers, by the architecture's record."""

from __future__ import annotations

import importlib

import torch
from transformers import PreTrainedConfig

from dense2moe.upcycle.models.architecture import Architecture


def make_rotary(family: Architecture, config: PreTrainedConfig) -> torch.nn.Module:
    """Transformers' own rotary embedding of an architecture that has one."""
    assert family.rotary is not None
    modeling = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    rotary: torch.nn.Module = getattr(modeling, family.rotary)(config)
    return rotary


def rotary_switch(config: PreTrainedConfig) -> int | None:
    """The length beyond which a longrope takes its long factors.

    None where nothing switches. Keys in the cache stay as they were rotated. So a text that comes in pieces has other
    logits than one that is read at once, here as in transformers, whose `dynamic_rope_update` (modeling_rope_utils.py,
    5.23) this is.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None
