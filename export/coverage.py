"""Coverage of the graph builder: the configs that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from transformers import PreTrainedConfig

from dense2moe.export.errors import ExportError
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.heads import generic_heads, split_class
from dense2moe.upcycle.models.parts import CLASS_OF_PART, TensorClass
from dense2moe.upcycle.models.table import DENSE_FAMILIES, TARGETS

Activation = Literal["silu", "quick_gelu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh"]
"""Functions of an FFN's inside; "gelu" is the form with erf, "relu2" the square of "relu"."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
"""What transformers' names of activations mean."""

DECODERS: tuple[Architecture, ...] = tuple(
    architecture for architecture in (*TARGETS, *DENSE_FAMILIES) if architecture.rotary is not None
)
"""Architectures that graphs are built of."""

_OTHER_HEADS = frozenset(head.ends for head in generic_heads())
"""How the classes of decoders end that give no logits of the next token."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""Rotary variants of the builder.

"dynamic" changes its frequencies beyond `max_position_embeddings` only, where a package ends.
"""


def find_decoder_family(config: PreTrainedConfig) -> Architecture:
    """The architecture of a config, its values checked.

    Raises:
        ExportError: the architecture, activation or rotary variant is not covered.
    """
    refusal = find_refusal(config)
    if refusal is not None:
        raise ExportError(refusal)
    return next(family for family in DECODERS if family.model_type == config.model_type)


def find_other_kind(config: PreTrainedConfig) -> str | None:
    """Why a model gives no logits of a next token.

    Of another kind of model no graph is written, neither built nor traced.
    """
    if not is_causal(config):
        return "config.json: is_causal is False; graphs are written of decoders that read from left to right alone"
    if config.architectures and split_class(config.architectures[0])[1] in _OTHER_HEADS:
        return (
            f"config.json: architectures is {config.architectures[0]}; graphs are written of decoders with logits of "
            "the next token alone"
        )
    return None


def find_refusal(config: PreTrainedConfig) -> str | None:
    """Why the graph builder does not cover a config, or None."""
    family = next((family for family in DECODERS if family.model_type == config.model_type), None)
    if family is not None and (refusal := find_other_kind(config)) is not None:
        return refusal
    if family is None:
        supported = ", ".join(family.model_type for family in DECODERS)
        return f"config.json: model_type {config.model_type} has no ONNX builder yet; supported: {supported}"
    if config.hidden_act not in ACTIVATIONS:
        return f"config.json: hidden_act is {config.hidden_act}; the builder covers {', '.join(ACTIVATIONS)}"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        return f"config.json: rope_type is {rope_type}; the builder covers {', '.join(ROPE_TYPES)}"
    refusal = family.refusal(config)
    return None if refusal is None else f"config.json: {refusal}"


def classify_tensor(family: Architecture, name: str) -> TensorClass:
    """The class of a tensor by its name.

    Raises:
        ExportError: the name is unknown, so that nothing is quantized or kept by accident.
    """
    part = family.find_part(name)
    if part is None:
        raise ExportError(
            f"tensor '{name}' is not known to the {family.model_type} family; it can be neither quantized nor exported"
        )
    return CLASS_OF_PART[part]
