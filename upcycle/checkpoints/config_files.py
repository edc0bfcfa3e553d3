"""Config files that transformers 4 and 5 read alike.

transformers 5 renamed what 4 reads, and 4 takes its own defaults for what it does not find, without a word. So each
value is written under both names, in one place, wherever a config or a tokenizer's config is written:

1. `rope_parameters` also as `rope_theta`, `rope_scaling` (null without a scaling) and, where it is there,
   `partial_rotary_factor`. longrope looks for `original_max_position_embeddings` beside the scaling.
2. `dtype` also as `torch_dtype`, which releases before 4.56 read.
3. Names that one architecture changed (`_RENAMED`).
4. In a tokenizer's config, the class `TokenizersBackend` by its name in 4, `PreTrainedTokenizerFast`, an alias in 5;
   and a list of `extra_special_tokens`, of which 4 wants a dict, as `additional_special_tokens`.

transformers 5 reads the same values with and without these. What 4 cannot say stays different there: Qwen2-MoE with
windows in some layers alone computes all layers with the window, and GraniteMoE with heads of another size than
hidden_size / num_attention_heads is refused.

Source: configuration_utils.py and modeling_rope_utils.py of both versions (4.57.6, 5.23).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dense2moe.upcycle.models.host import MODEL_TYPE_PREFIX

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_RENAMED: Mapping[str, Mapping[str, str]] = {"qwen3_moe": {"num_experts": "num_local_experts"}}
"""By model_type, the name in transformers 4 of a field that 5 writes under another."""

_ROTARY_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    "gpt_neox_japanese": {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    "modernbert": {
        "global_rope_theta": "full_attention.rope_theta",
        "local_rope_theta": "sliding_attention.rope_theta",
    },
    "modernbert-decoder": {
        "global_rope_theta": "full_attention.rope_theta",
        "local_rope_theta": "sliding_attention.rope_theta",
    },
    "olmo3": {"rope_theta": "full_attention.rope_theta"},
}
"""By model_type, fields of transformers 4 for parts of `rope_parameters`; with a dot, those of one kind of layers."""

_STRICT_SCALINGS: Mapping[str, tuple[str, ...]] = {"phi3": ("long_factor", "short_factor"), "olmo2": ("factor",)}
"""Architectures that in transformers 4 refuse a scaling with any other keys than these and `type`."""


def save_config(config: PreTrainedConfig, directory: Path) -> None:
    """Write a config as `config.json` into `directory`, for transformers 4 and 5."""
    config.save_pretrained(directory)
    complete_config(directory)


def complete_config(directory: Path) -> None:
    """Add the names that transformers 4 reads to a saved `config.json`.

    The file is one that transformers 5 saved in `directory`.
    """
    path = directory / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    if not values["model_type"].startswith(MODEL_TYPE_PREFIX):
        # names code beside the dense checkpoint, which is not carried: the class is transformers' own
        values.pop("auto_map", None)
    path.write_text(json.dumps(values | old_fields(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def old_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 under the field names of transformers 4."""
    model_type = values["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    old = {name: values[new] for name, new in _RENAMED.get(model_type, {}).items()}
    if "dtype" in values:
        old["torch_dtype"] = values["dtype"]
    rope: Mapping[str, Any] = values.get("rope_parameters") or {}
    for name, path in _ROTARY_NAMES.get(model_type, {}).items():
        *kinds, own = path.split(".")
        part = rope.get(kinds[0], {}) if kinds else rope
        old |= {name: part[own]} if own in part else {}
    # one for all layers; 4 has few names for one for each kind of layer
    if rope and not any(isinstance(value, dict) for value in rope.values()):
        apart = ("rope_theta", "partial_rotary_factor")
        old |= {name: rope[name] for name in apart if name in rope}
        old["rope_scaling"] = None if rope["rope_type"] == "default" else _old_scaling(model_type, rope)
        if rope["rope_type"] == "longrope" and "original_max_position_embeddings" in rope:
            old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return old


def _old_scaling(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    if model_type in _STRICT_SCALINGS:
        return {
            "type": rope["rope_type"],
            **{name: rope[name] for name in _STRICT_SCALINGS[model_type] if name in rope},
        }
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}


def complete_tokenizer(directory: Path) -> None:
    """Rewrite the `tokenizer_config.json` in `directory`, if transformers 5 saved it.

    So that transformers 4 knows its class and its tokens.
    """
    path = directory / TOKENIZER_CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # none, or none that anybody can read: it stays what it is
    if not isinstance(values, dict) or values.get("tokenizer_class") != "TokenizersBackend":
        return
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
