"""Tensors of a checkpoint under the names of the model's modules.

Files may have older names than the modules of transformers, or lack the prefix that a model with a head has; whatever
transformers renames at loading is renamed here, by transformers' own rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from dense2moe.upcycle.checkpoints.mixture_classes import find_class
from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.errors import UpcycleError, describe_error


@dataclass(frozen=True)
class ModelTensors:
    """What a model holds: shapes by name, and tied names.

    `unread` are regular expressions of stored tensors that the class does not look at, `made` of its own that it makes
    itself where no file has them, such as sines.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    unread: tuple[str, ...]
    made: tuple[str, ...] = ()


def build_empty(config: PreTrainedConfig, architecture: str, where: str) -> Any:
    """A model without values, on the meta device.

    Raises:
        UpcycleError: transformers cannot build a model of the config, which `where` names.
    """
    try:
        with torch.device("meta"):
            return find_class(architecture)(config)
    # torch and transformers raise many kinds for values that make no model, plain asserts and KeyErrors among them
    except Exception as error:
        raise UpcycleError(
            f"{where}: transformers cannot build {architecture} of these values ({describe_error(error)}); correct "
            "the file"
        ) from error


def name_by_modules(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries under the names that the model's state has for them.

    A tensor that transformers cuts into several by rows is as many here, and one that is stored under a name that is
    tied to another, which is not stored, has the other's.
    """
    rules = get_model_conversion_mapping(model)
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    named: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        converter = next((rule for rule in converters if pattern in rule.source_patterns), None)
        if converter is None:
            key = name if own in named else own
            named[key] = replace(entry, name=key)
        elif _cuts_rows(converter):
            for key, part in _cut(own, converter.target_patterns, entry):
                named[key] = part
        else:
            named[name] = entry
    for key, source in model.all_tied_weights_keys.items():
        if key in named and source not in named:
            named[source] = replace(named.pop(key), name=source)
    return named


def name_for_files(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls tensors in files, by the model's own names.

    They may be older than the modules' names, and the only ones that are read back as these. What transformers joins
    into one tensor keeps its name.
    """
    rules: Any = [
        rule.reverse_transform()
        for rule in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)
    ]
    return {name: apply_renamings(name, rules) for name in names}


def _cuts_rows(rule: WeightConverter) -> bool:
    return len(rule.operations) == 1 and isinstance(rule.operations[0], Chunk) and rule.operations[0].dim == 0


def _cut(first: str, patterns: list[str], entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    """Equal parts of a tensor, by rows.

    `first` is the name of the first of them.
    """
    rows, size = entry.num_rows // len(patterns), entry.num_bytes // len(patterns)
    for number, pattern in enumerate(patterns):
        name = first.replace(patterns[0], pattern)
        start = entry.start + number * size
        yield name, replace(entry, name=name, shape=(rows, *entry.shape[1:]), start=start, num_bytes=size)


def describe_tensors(model: Any) -> ModelTensors:
    """What a model holds."""
    tied = frozenset(model.all_tied_weights_keys)
    return ModelTensors(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied},
        tied,
        tuple(model._keys_to_ignore_on_load_unexpected or ()),
        tuple(model._keys_to_ignore_on_load_missing or ()),
    )
