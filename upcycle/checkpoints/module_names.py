"""Tensors of a checkpoint under the names of the model's modules.

Files may have older names than the modules of transformers, or lack the prefix that a model with a head has; whatever
transformers renames at loading is renamed here, by transformers' own rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.errors import UpcycleError, describe_error
from dense2moe.upcycle.models import mixture
from dense2moe.upcycle.models.host import CLASS_PREFIX


@dataclass(frozen=True)
class ModelTensors:
    """What a model holds: shapes by name, and tied names.

    `unread` are regular expressions of stored tensors that the class does not look at.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    unread: tuple[str, ...]


def build_empty(config: PreTrainedConfig, architecture: str, where: str) -> Any:
    """A model without values, on the meta device.

    Raises:
        UpcycleError: transformers cannot build a model of the config, which `where` names.
    """
    try:
        if architecture.startswith(CLASS_PREFIX):
            model_class = mixture.find_class(architecture)
        else:
            model_class = getattr(transformers, architecture)
        with torch.device("meta"):
            return model_class(config)
    # torch and transformers raise many kinds for values that make no model, plain asserts and KeyErrors among them
    except Exception as error:
        raise UpcycleError(
            f"{where}: transformers cannot build {architecture} of these values ({describe_error(error)}); correct "
            "the file"
        ) from error


def name_by_modules(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries under the names that the model's state has for them."""
    rules = get_model_conversion_mapping(model)
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    named: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        own, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        key = own if converter is None and own not in named else name
        named[key] = replace(entry, name=key)
    return named


def describe_tensors(model: Any) -> ModelTensors:
    """What a model holds."""
    tied = frozenset(model.all_tied_weights_keys)
    return ModelTensors(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied},
        tied,
        tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )
