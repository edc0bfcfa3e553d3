"""The dense checkpoint, checked before it is upcycled."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from dense2moe.upcycle.checkpoints.module_names import build_empty, describe_tensors
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES, TensorEntry
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models.architecture import Architecture, Conversion
from dense2moe.upcycle.models.table import COMMON_NEUTRAL, find_host

_WINDOW_FIELDS = {"sliding_window", "layer_types", "attention_chunk_size"}
"""What transformers' cache reads of any config, whether its class has the field or not.

See `get_layer_types_and_kwargs` (cache_utils.py, 5.23).
"""
_SCALE_ENDS = ("scale", "scale_inv", ".scales", ".qzeros", ".g_idx", ".absmax", ".quant_map", "zero_point", ".SCB")
_UNQUANTIZED = ("F64", "I64", "BOOL")


def refuse_untied(checkpoint: Checkpoint, family: Architecture) -> None:
    """Refuse an untied head where the target takes the embedding."""
    head = family.find("head")
    if family.is_host:  # all that is stored is kept
        return
    if not checkpoint.untied or (head is not None and head != family.find("embedding")):
        return
    name = checkpoint.untied[0]
    raise UpcycleError(
        f"{checkpoint.entries[name].file}: tensor '{name}' differs from the embedding, so transformers uses both; a "
        "mixture made of "
        f"{family.architecture} has one for both; remove the tensor if the embedding alone is meant"
    )


def refuse_unknown_fields(source: PreTrainedConfig, conversion: Conversion, where: str) -> None:
    """Refuse values of config fields that no table knows.

    A newer transformers may have given the field a meaning. Its default is taken.
    """
    if conversion.keeps_rest:
        return
    known = {
        *conversion.carried,
        *conversion.required,
        *conversion.consumed,
        *conversion.optional,
        *conversion.neutral,
        *COMMON_NEUTRAL,
    }
    defaults = type(source)()
    for name in sorted(_WINDOW_FIELDS - set(type(source).__dataclass_fields__)):
        if getattr(source, name, None) is not None:
            raise UpcycleError(
                f"{where}: {name} is {shorten(getattr(source, name))}; {conversion.family.architecture} has no "
                "windows, but the key-value cache of "
                "transformers takes them from there, so that decoding would differ from prefill; remove the field"
            )
    for name in type(source).__dataclass_fields__:
        if (
            name not in known
            and hasattr(source, name)
            and (value := getattr(source, name)) != getattr(defaults, name, None)
        ):
            raise UpcycleError(
                f"{where}: {name} is {shorten(value)}, a setting that {conversion.target.architecture} does not know; "
                "remove it or set its default"
            )


def check_tensors(checkpoint: Checkpoint, family: Architecture) -> tuple[str, ...]:
    """Compare stored tensors with transformers' own model of the config.

    Returns the names that are dropped.
    """
    _check_depth(checkpoint, family)
    if family.is_host:
        return _check_host(checkpoint, family)
    expected, tied = _expected(checkpoint.config, family.architecture, str(checkpoint.directory / "config.json"))
    num_layers = max(stack.count_layers(checkpoint.config) for stack in family.stacks)
    droppable = {pattern.format(layer=layer) for pattern in family.dropped for layer in range(num_layers)}
    droppable |= (
        tied  # copies of the embedding with equal values: with others, `open_checkpoint` says that nothing is tied
    )
    dropped = tuple(sorted(droppable & set(checkpoint.entries)))
    for name, entry in checkpoint.entries.items():
        if name not in dropped:
            _refuse_quantized(entry, checkpoint.directory, expected)
    _compare_shapes(checkpoint, expected, set(dropped), family)
    return dropped


def _compare_shapes(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], others: set[str], family: Architecture
) -> None:
    """Refuse missing tensors, other shapes, and all beside `others`."""
    for name, shape in expected.items():
        if name not in checkpoint.entries:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' is missing; by config.json it must be there with shape "
                f"{list(shape)}"
            )
        found = checkpoint.entries[name].shape
        if found != shape:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' has shape {list(found)}; by config.json it must be "
                f"{list(shape)}"
            )
    for name in checkpoint.entries:
        if name not in expected and name not in others:
            raise UpcycleError(
                f"{checkpoint.directory}: tensor '{name}' has no place in {family.architecture}; it would be lost; "
                "remove it"
            )


def _check_host(checkpoint: Checkpoint, family: Architecture) -> tuple[str, ...]:
    """Compare stored tensors with transformers' own model of a host.

    Returns the names that are dropped: what its class does not read.
    """
    where = str(checkpoint.directory / "config.json")
    expected = describe_tensors(build_empty(checkpoint.config, family.architecture, where))
    unread = [*(fnmatch.translate(pattern) for pattern in family.dropped), *expected.unread]
    dropped = tuple(
        sorted(
            name
            for name in checkpoint.entries
            if name not in expected.shapes
            and name not in expected.tied
            and any(re.search(pattern, name) for pattern in unread)
        )
    )
    for name, entry in checkpoint.entries.items():
        if name not in dropped:
            _refuse_quantized(entry, checkpoint.directory, expected.shapes)
    host = find_host(checkpoint.config.model_type)
    assert host is not None, f"{family.architecture} is no host"
    absent = [fnmatch.translate(each) for each in host.find_absent(family.architecture, checkpoint.entries)]
    lacked = re.compile("|".join([*(f"^{pattern}" for pattern in absent), *expected.made]) or "$^")
    needed = {
        name: shape for name, shape in expected.shapes.items() if name in checkpoint.entries or not lacked.search(name)
    }
    _compare_shapes(checkpoint, needed, {*dropped, *expected.tied}, family)
    return dropped


def _refuse_quantized(entry: TensorEntry, directory: Path, expected: Container[str]) -> None:
    """Refuse quantized weights: integers, narrow floats, and their scales.

    `expected` are the model's own tensors: one of CLIP's is named as a scale.
    """
    if entry.dtype not in DTYPES:
        hint = "" if entry.dtype in _UNQUANTIZED else "; dequantize the model first, or give it as it was before"
        raise UpcycleError(
            f"{directory}: tensor '{entry.name}' is stored as {entry.dtype}; it must be one of "
            f"{', '.join(DTYPES)}{hint}"
        )
    if entry.name.endswith(_SCALE_ENDS) and entry.name not in expected:
        raise UpcycleError(
            f"{directory}: tensor '{entry.name}' belongs to quantized weights, which are wrong without it; "
            "dequantize the model first, or give it "
            "as it was before"
        )


def _check_depth(checkpoint: Checkpoint, family: Architecture) -> None:
    """Refuse an absurd number of layers, before a model is built."""
    for stack in family.stacks:
        count = stack.count_layers(checkpoint.config)
        if count < 1 and stack.when is None:
            raise UpcycleError(
                f"{checkpoint.directory / 'config.json'}: {stack.num_layers} is {count}; it must be at least 1"
            )
        if count > len(checkpoint.entries):
            raise UpcycleError(
                f"{checkpoint.directory / 'config.json'}: {stack.num_layers} is {count}; the files hold "
                f"{len(checkpoint.entries)} tensors, too few"
            )


def expected_shapes(config: PreTrainedConfig, architecture: str, where: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model; allocates nothing.

    Tied copies are left out.

    Raises:
        UpcycleError: transformers cannot build a model of the config, which `where` names.
    """
    return _expected(config, architecture, where)[0]


def _expected(
    config: PreTrainedConfig, architecture: str, where: str
) -> tuple[Mapping[str, tuple[int, ...]], set[str]]:
    found = describe_tensors(build_empty(config, architecture, where))
    return found.shapes, set(found.tied)
