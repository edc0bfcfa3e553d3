"""A package's config.json and generation_config.json beside the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dense2moe.export.parity.files.sentences import as_ids, show, show_ids, tell_wrong
from dense2moe.export.parity.files.sides import (
    Failure,
    Sides,
    attempt,
    read_json,
    read_sides,
    tell_damage,
    tell_missing,
)
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.storage import GENAI_CONFIG_NAME
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME
from dense2moe.upcycle.models.host import MODEL_TYPE_PREFIX

_LABELS = "id2label"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "max_length": 20,
    "use_cache": True,
}
"""Defaults of generation settings but those that are 0, off or none.

Source: GenerationConfig._get_default_generation_params, transformers 5.23.
"""


def check_generation(sides: Sides) -> FilesCheck:
    """Compare end-of-text tokens and sampling settings."""
    name = GENERATION_CONFIG_NAME
    in_package, in_twin = ((directory / name).is_file() for directory in (sides.package, sides.twin))
    if in_package and not in_twin and sides.config is not None:
        found = attempt(read_json, sides.package / name)
        if isinstance(found, Failure):
            return FilesCheck((name,), (), (tell_damage(name, "package", found),))
        # what transformers makes of a checkpoint without one
        expected = {field: getattr(sides.config, field, None) for field in TOKEN_IDS}
        return FilesCheck((name,), (), tuple(_compare_settings(found, expected)))
    if not (in_package and in_twin):
        return tell_missing(name, in_package, in_twin, sides.is_ours)
    both = read_sides(sides, name)
    return both if isinstance(both, FilesCheck) else FilesCheck((name,), (), tuple(_compare_settings(*both)))


def _compare_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(found.keys() | expected.keys()):
        if field.startswith("_") or field == "transformers_version":
            continue
        where = f"{GENERATION_CONFIG_NAME}: {show(field)[1:-1]}"
        if field.endswith("token_id"):
            right = as_ids(expected.get(field))
            if as_ids(found.get(field)) != right:
                yield tell_wrong(where, found.get(field), show_ids(right))
            continue
        values = [_DEFAULTS.get(field) if each.get(field) is None else each[field] for each in (found, expected)]
        if values[0] != values[1] and (values[0] or values[1]):  # 0, off and none are one
            yield tell_wrong(
                where, found.get(field), "left out" if expected.get(field) is None else show(expected[field])
            )


def check_config(sides: Sides) -> FilesCheck:
    """Compare architecture, sizes, labels and special tokens."""
    name = CONFIG_NAME
    in_package, in_twin = ((directory / name).is_file() for directory in (sides.package, sides.twin))
    if not (in_package and in_twin):
        is_required = sides.is_ours or not (sides.package / GENAI_CONFIG_NAME).is_file()
        return tell_missing(name, in_package, in_twin, is_required)
    both = read_sides(sides, name)
    if isinstance(both, FilesCheck):
        return both
    found, expected = map(_flatten, both)
    if is_own(str(expected.get("model_type"))):  # a package names the dense family, which clients know
        expected["model_type"] = str(expected["model_type"]).removeprefix(MODEL_TYPE_PREFIX)
    if sides.graph is not None and sides.graph.head_size is not None:
        expected["head_dim"] = sides.graph.head_size  # by which clients allocate the cache, whatever it is padded to
    if not sides.is_parent:
        return FilesCheck((name,), (), tuple(_compare_configs(found, expected, sides.config)))
    left_out = f"{name}: model_type is not compared; the package is a mixture, the checkpoint dense"
    return FilesCheck(
        (name,),
        (left_out,),
        tuple(_compare_configs(found, {**expected, "model_type": found.get("model_type")}, sides.config)),
    )


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """A config with the fields of its language model at the top."""
    inner = values.get("text_config")
    return {**inner, **values} if isinstance(inner, dict) else values


def _compare_configs(found: Mapping[str, Any], expected: Mapping[str, Any], config: Any) -> Iterator[str]:
    """Compare fields that either file has.

    `config` has the class's defaults for those that the checkpoint's leaves out.
    """
    for field in ("model_type", *_SIZES):
        if found.get(field) is None and expected.get(field) is None:
            continue
        value = found[field] if found.get(field) is not None else _implied(found, field)
        right = expected[field] if expected.get(field) is not None else getattr(config, field, None)
        if right is not None and value != right:
            yield tell_wrong(f"{CONFIG_NAME}: {field}", value, show(right))
    labels = expected.get(_LABELS)
    if labels is not None and found.get(_LABELS) != labels:
        yield tell_wrong(f"{CONFIG_NAME}: {_LABELS}", found.get(_LABELS), show(labels))
    for field in TOKEN_IDS:
        if field not in found and expected.get(field) is None:
            continue
        right = as_ids(expected[field] if field in expected else getattr(config, field, None))
        if as_ids(found.get(field)) != right:
            yield tell_wrong(f"{CONFIG_NAME}: {field}", found.get(field), show_ids(right))


def _implied(values: Mapping[str, Any], field: str) -> Any:
    """The value our runtime assumes for a field a config omits."""
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if field == "num_key_value_heads":
        return heads
    return (
        width // heads if field == "head_dim" and isinstance(width, int) and isinstance(heads, int) and heads else None
    )
