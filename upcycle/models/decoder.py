"""Decoders of Llama's shape: names, config fields and conditions they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dense2moe.upcycle.models.architecture import Architecture, Condition, Required, Stack
from dense2moe.upcycle.models.heads import TASK_OF_HEAD, Head, split_class
from dense2moe.upcycle.models.parts import Matrix, Part

LAYER = "model.layers.{layer}."
MLP = f"{LAYER}mlp."
SPARSE = f"{LAYER}block_sparse_moe."

OUTSIDE: Mapping[Part, Matrix] = {
    "embedding": Matrix("model.embed_tokens.weight"),
    "final_norm": Matrix("model.norm.weight"),
    "head": Matrix("lm_head.weight"),
}
QUERY_KEY_VALUE_BIASES: tuple[Part, ...] = ("query_bias", "key_bias", "value_bias")
BIASES: tuple[Part, ...] = (*QUERY_KEY_VALUE_BIASES, "attention_output_bias")
HEAD_NORMS: tuple[Part, ...] = ("query_norm", "key_norm")

_NORMS_BEFORE: Mapping[Part, str] = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER: Mapping[Part, str] = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_ATTENTION: Mapping[Part, str] = {
    "query": "q_proj.weight",
    "query_bias": "q_proj.bias",
    "key": "k_proj.weight",
    "key_bias": "k_proj.bias",
    "value": "v_proj.weight",
    "value_bias": "v_proj.bias",
    "attention_output": "o_proj.weight",
    "attention_output_bias": "o_proj.bias",
    "query_norm": "q_norm.weight",
    "key_norm": "k_norm.weight",
}
_FFN: Mapping[Part, str] = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
_EXPERTS: Mapping[Part, str] = {"expert_gate": "gate_proj", "expert_up": "up_proj", "expert_down": "down_proj"}
_SHARED: Mapping[Part, str] = {"shared_gate": "gate_proj", "shared_up": "up_proj", "shared_down": "down_proj"}

FFN: Mapping[Part, Matrix] = {part: Matrix(f"{MLP}{name}.weight") for part, name in _FFN.items()}
ROUTER: Mapping[Part, Matrix] = {"router": Matrix(f"{MLP}gate.weight")}
EXPERTS: Mapping[Part, Matrix] = {
    part: Matrix(f"{MLP}experts.{{expert}}.{name}.weight") for part, name in _EXPERTS.items()
}


def shared_expert(module: str) -> dict[Part, Matrix]:
    """The parts of a shared expert, in a module of this name."""
    return {part: Matrix(f"{MLP}{module}.{name}.weight") for part, name in _SHARED.items()}


def attention_layer(optional: Iterable[Part] = (), norms_after: bool = False) -> dict[Part, Matrix]:
    """The parts of a layer beside its FFN.

    `optional` are biases and norms within attention; other norms stand before attention and FFN, or after them.
    OLMo calls the norm after attention as Llama calls the one before the FFN.
    """
    absent = {*BIASES, *HEAD_NORMS} - set(optional)
    attention = {part: Matrix(f"{LAYER}self_attn.{name}") for part, name in _ATTENTION.items() if part not in absent}
    norms = {
        part: Matrix(f"{LAYER}{name}.weight") for part, name in (_NORMS_AFTER if norms_after else _NORMS_BEFORE).items()
    }
    first = norms.pop("attention_norm", None)
    return {**({} if first is None else {"attention_norm": first}), **attention, **norms}


def dense_decoder(
    model_type: str,
    architecture: str,
    layer: Mapping[Part, Matrix],
    outside: Mapping[Part, Matrix] = OUTSIDE,
    rotary: str | None = None,
    heads: tuple[Head, ...] = (),
) -> Architecture:
    """A dense decoder, or encoder, of Llama's shape."""
    return Architecture(
        model_type,
        architecture,
        TASK_OF_HEAD[split_class(architecture)[1]],
        outside,
        (Stack("num_hidden_layers", layer),),
        dropped=(f"{LAYER}self_attn.rotary_emb.inv_freq",),
        ffn_module="layers.{layer}.mlp",
        heads=heads,
        rotary=rotary,
    )


def sparse_layers(*parts: Mapping[Part, Matrix]) -> tuple[Stack, ...]:
    """The layers of a sparse decoder of Llama's shape."""
    return (Stack("num_hidden_layers", {part: matrix for some in parts for part, matrix in some.items()}),)


# Config fields

FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)
FIELDS_WITHOUT_ROPE = tuple(name for name in FIELDS if name != "rope_parameters")
WIDTH = ("intermediate_size",)  # becomes the experts' width
WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

NO_MLP_BIAS = Required(False, "no mixture-of-experts architecture of transformers has expert biases with this FFN")
NO_OUTPUT_BIAS = Required(False, "its attention has no bias after the output projection")


def _partial_rotary(config: Any) -> float:
    return float((config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


WHOLE_ROTARY = Condition(
    lambda c: _partial_rotary(c) == 1.0,
    lambda c: f"partial_rotary_factor is {_partial_rotary(c)}; it must be 1: the targets rotate whole heads",
)


def head_dim(config: Any) -> int:
    """Elements of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def one_window(config: Any, _: int) -> int | None:
    """The window of all layers."""
    window: int | None = config.sliding_window
    return window
