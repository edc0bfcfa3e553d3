"""Parts of a model: the vocabulary for where tensors lie.

A dense and a sparse architecture that mean the same by a part can hand it on, whatever each calls its tensor. A bias
and a norm are parts of their own, so that an architecture without them leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal[
    # outside of the layers
    "embedding",
    "encoder_final_norm",
    "final_norm",
    "head",
    "label_head",
    "label_head_bias",
    # attention, and the norms before and after it
    "attention_norm",
    "query",
    "query_bias",
    "key",
    "key_bias",
    "value",
    "value_bias",
    "attention_output",
    "attention_output_bias",
    "query_norm",
    "key_norm",
    "sinks",
    "positions",
    "attention_post_norm",
    # a short convolution, in the place of attention
    "convolution_input",
    "convolution_input_bias",
    "convolution_kernel",
    "convolution_kernel_bias",
    "convolution_output",
    "convolution_output_bias",
    # attention over what an encoder gives
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "cross_attention_norm",
    # the FFN of a dense layer, and the norms before and after any FFN
    "ffn_norm",
    "ffn_norm_bias",
    "ffn_gate",
    "ffn_gate_bias",
    "ffn_up",
    "ffn_up_bias",
    "ffn_down",
    "ffn_down_bias",
    "ffn_post_norm",
    # in the FFN's place: experts, and one that every token visits, its output times the sigmoid of `shared_scale`
    "router",
    "router_query",
    "selection_bias",
    "expert_gate",
    "expert_gate_bias",
    "expert_up",
    "expert_up_bias",
    "expert_down",
    "expert_down_bias",
    "shared_gate",
    "shared_gate_bias",
    "shared_up",
    "shared_up_bias",
    "shared_down",
    "shared_down_bias",
    "shared_scale",
]

QUERY_KEY_VALUE: tuple[Part, ...] = ("query", "key", "value")
ATTENTION: tuple[Part, ...] = (*QUERY_KEY_VALUE, "attention_output")

TensorClass = Literal["experts", "router", "attention", "embedding", "head", "norm", "bias"]
"""Kinds of tensors, for the bits that each is stored in."""

CLASS_OF_PART: Mapping[Part, TensorClass] = {
    "embedding": "embedding",
    "encoder_final_norm": "norm",
    "final_norm": "norm",
    "head": "head",
    "label_head": "head",
    "label_head_bias": "bias",
    "attention_norm": "norm",
    "query": "attention",
    "query_bias": "bias",
    "key": "attention",
    "key_bias": "bias",
    "value": "attention",
    "value_bias": "bias",
    "attention_output": "attention",
    "attention_output_bias": "bias",
    "query_norm": "norm",
    "key_norm": "norm",
    "sinks": "bias",
    "positions": "embedding",
    "attention_post_norm": "norm",
    "convolution_input": "attention",
    "convolution_input_bias": "bias",
    "convolution_kernel": "norm",
    "convolution_kernel_bias": "bias",
    "convolution_output": "attention",
    "convolution_output_bias": "bias",
    "cross_query": "attention",
    "cross_key": "attention",
    "cross_value": "attention",
    "cross_attention_output": "attention",
    "cross_attention_norm": "norm",
    "ffn_norm": "norm",
    "ffn_norm_bias": "bias",
    "ffn_gate": "experts",
    "ffn_gate_bias": "bias",
    "ffn_up": "experts",
    "ffn_up_bias": "bias",
    "ffn_down": "experts",
    "ffn_down_bias": "bias",
    "ffn_post_norm": "norm",
    "router": "router",
    "router_query": "router",
    "selection_bias": "router",
    "expert_gate": "experts",
    "expert_gate_bias": "bias",
    "expert_up": "experts",
    "expert_up_bias": "bias",
    "expert_down": "experts",
    "expert_down_bias": "bias",
    "shared_gate": "experts",
    "shared_gate_bias": "bias",
    "shared_up": "experts",
    "shared_up_bias": "bias",
    "shared_down": "experts",
    "shared_down_bias": "bias",
    "shared_scale": "router",
}

Rows = Callable[[Any], tuple[int, int]]
"""From a config to the first row of a part in a fused tensor, and the row after its last."""


@dataclass(frozen=True)
class AddOne:
    """Fold of a norm that multiplies by 1 + w."""


@dataclass(frozen=True)
class MultiplyByRootOfWidth:
    """Fold of an embedding multiplied by the root of its width."""


Fold = AddOne | MultiplyByRootOfWidth
"""Arithmetic of a model that is moved into its weight: done, and stored, in float32, so that nothing is rounded."""


@dataclass(frozen=True)
class Matrix:
    """Where the matrix or vector of one part lies.

    A tensor's name, with `{layer}` where each layer has one and `{expert}` where each expert has one; `rows`, where
    several parts share the tensor; and what must be folded into it for an architecture without that arithmetic.
    `half` is the one of two halves of the tensor's rows that it has. `transposed`: its columns are what it gives, as in
    transformers' Conv1D. `as_row`: a vector that lies there as a matrix of one row.
    """

    name: str
    rows: Rows | None = None
    fold: Fold | None = None
    half: Literal["first", "last"] | None = None
    transposed: bool = False
    as_row: bool = False


@dataclass(frozen=True)
class Ffn:
    """Names of one FFN's tensors.

    Where the FFN is gated and `gate` is None, `up` holds the gate's rows before its own, and so does its bias. A
    checkpoint may lack the biases.
    """

    gate: str | None
    up: str
    down: str
    is_gated: bool
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        found = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return tuple(name for name in found if name is not None)


def layer_of(name: str) -> int:
    """The layer of a tensor, by its name; -1 outside of layers."""
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), -1)


def bias_name(matrix: str) -> str:
    """The name of a matrix's bias."""
    return matrix.removesuffix(".weight") + ".bias"


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor's name is of a pattern with `{layer}` and `{expert}`."""
    pieces, found = pattern.split("."), name.split(".")
    return len(pieces) == len(found) and all(
        piece == own or (piece.startswith("{") and own.isdigit()) for piece, own in zip(pieces, found, strict=True)
    )
