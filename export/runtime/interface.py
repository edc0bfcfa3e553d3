"""A decoder graph's interface: names, types and shapes of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from packaging.version import Version

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import Config
from dense2moe.upcycle.errors import one_line_errors, shorten

ELEMENT_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
}


def check_interface(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a graph that lacks a decoder's inputs and outputs, by name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - weights
    past = {name for name in inputs if names.is_past(name)}
    needed = {names.INPUT_IDS, names.ATTENTION_MASK}
    strange = {name for name in past if names.parse_state(name) is None} | inputs - past - needed - {
        names.POSITION_IDS,
        names.FIRST_LOGIT,
        names.ROUTER_NUDGE,
    }
    lacking = needed - inputs | ({names.LOGITS} | {names.present_of(name) for name in past}) - {
        value.name for value in model.graph.output
    }
    if not past and names.LOGITS not in lacking and names.FIRST_LOGIT not in inputs:
        raise ExportError(
            f"{path}: has no cache of keys and values: it reads {', '.join(sorted(inputs))} in one pass, as an encoder "
            "does, and continues no text; give a decoder's package"
        )
    if strange or lacking or not past:
        what = (
            f"lacks {', '.join(sorted(lacking))}"
            if lacking
            else f"has the input {min(strange)}"
            if strange
            else f"lacks {names.past(0, 'key')}"
        )
        raise ExportError(
            f"{path}: {what}; a decoder takes input_ids, attention_mask, past_key_values.N.key and .value, and "
            "optionally position_ids, and gives logits, and present.N.key and .value; export it with these names"
        )


def check_version(needed: str, path: Path) -> None:
    """Refuse a package that needs a newer onnxruntime."""
    with one_line_errors(path, f"says that it needs onnxruntime {shorten(needed)!r}", "export it again", ExportError):
        oldest = Version(needed)
    if Version(ort.__version__) < oldest:
        raise ExportError(f"{path}: needs onnxruntime {needed} or newer; this is {ort.__version__}; upgrade it")


def check_types(values: Mapping[str, ort.NodeArg], path: Path) -> None:
    """Refuse inputs and outputs whose types or ranks no decoder has."""
    for name, value in values.items():
        is_state = name == names.LOGITS or names.is_state(name)
        types = (
            tuple(ELEMENT_TYPES)
            if is_state
            else ("tensor(int64)",)
            if name in (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS)
            else (value.type,)
        )
        if value.type not in types:
            raise ExportError(f"{path}: {name} is a {value.type}; must be a {' or '.join(types)}; export it so")
        rank = 3 if name == names.LOGITS else 4 if names.is_past(name) else None
        if rank is not None and len(value.shape) != rank:
            shown = {3: "[batch, tokens, vocabulary]", 4: "[batch, heads, tokens, head size]"}[rank]
            raise ExportError(f"{path}: {name} has {len(value.shape)} dimensions; must be {shown}; export it so")


def read_cache_shape(value: ort.NodeArg, config: Config) -> tuple[Any, int, Any, int]:
    """The shape [B, heads, length, head_dim] of a cached key or value.

    The graph says it; the config fills in a size that the graph leaves open.
    """
    batch, heads, length, head_dim = value.shape
    if not isinstance(heads, int):
        heads = config.size("num_key_value_heads" if "num_key_value_heads" in config.values else "num_attention_heads")
    if not isinstance(head_dim, int):
        head_dim = (
            config.size("head_dim")
            if "head_dim" in config.values
            else config.size("hidden_size") // config.size("num_attention_heads")
        )
    return batch, int(heads), length, int(head_dim)
