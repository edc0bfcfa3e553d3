"""The table of conversions: which dense family becomes which target, and every config field's fate.

A field that bears on the forward pass is carried, or the target's fields are derived from it, or it must have the one
value that the target can express, or the conversion refuses; `tests/test_conversion.py` checks that every field of the
config class is classified, and that every field that only the target has is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.checkpoints.config_files import EXPERT_COUNTS
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models.dense import (
    DENSE_FAMILIES,
    GEMMA,
    GRANITE,
    LLAMA,
    MISTRAL,
    NO_TWIN,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    T5,
    TRAITS,
    DenseFamily,
)
from dense2moe.upcycle.models.sparse import (
    FLEX_OLMO,
    GLM4_MOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    SWITCH_TRANSFORMERS,
    MoeTarget,
)


@dataclass(frozen=True)
class Required:
    """A config value that the target cannot express otherwise, and the reason in words."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Condition:
    """What must hold of the source's config, in the words of the refusal: what is, what must be and why."""

    holds: Callable[[Any], bool]
    refusal: Callable[[Any], str]


@dataclass(frozen=True)
class Conversion:
    """One row: a dense family, a target, and the fate of every config field.

    carried: same name and meaning on both sides.
    optional: carried where the source has them; no declared field of one side or the other, but its forward pass reads
    them.
    required: must have this value. consumed: read by `derived` or `conditions` alone. neutral: no forward pass reads
    them.
    derived: target fields that follow from the source's config.
    zero_router: what a zero router with k = 1 or 2 gives with plain copies; "bitwise", or equal within rounding.
    by_name_alone: 'auto' never takes it.
    """

    family: DenseFamily
    target: MoeTarget
    carried: tuple[str, ...]
    required: Mapping[str, Required] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    derived: Callable[[Any], dict[str, Any]] = lambda _: {}
    consumed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    zero_router: Literal["bitwise", "rounding"] = "bitwise"
    by_name_alone: bool = False

    def refusals(self, source: Any, config: UpcycleConfig) -> list[str]:
        """Why this target cannot hold the source with these settings, one reason each; empty where it can."""
        architecture = self.target.architecture
        reasons = [
            f"{name} is {value}; {architecture} needs {required.value}: {required.reason}"
            for name, required in self.required.items()
            if (value := getattr(source, name, required.value)) != required.value
        ]
        reasons += [condition.refusal(source) for condition in self.conditions if not condition.holds(source)]
        if config.router.kind != "normal" and self.family.ffn_module is None:
            reasons.append(
                f"upcycle.router.kind is {config.router.kind}; {architecture} needs normal: it is exact with a zero "
                "router alone"
            )
        depths = [getattr(source, ffn.num_layers) for ffn in self.family.ffns]
        return reasons + _setting_refusals(self.target, config, depths)


def _setting_refusals(target: MoeTarget, config: UpcycleConfig, depths: list[int]) -> list[str]:
    """What of the settings the target cannot express; `depths` are the layers of each stack of the source."""
    reasons = []
    if target.partial_layers == "none" and any(len(resolve_layers(config.layers, depth)) < depth for depth in depths):
        reasons.append(
            f"upcycle.layers is {_shown(config.layers)}; {target.architecture} needs all: it has experts in every layer"
        )
    if target.partial_layers == "last" and any(
        resolve_layers(config.layers, depth)[0] + len(resolve_layers(config.layers, depth)) < depth for depth in depths
    ):
        reasons.append(
            f"upcycle.layers is {_shown(config.layers)}; {target.architecture} needs layers up to the last: it has "
            "dense ones before them alone"
        )
    if config.num_experts < target.min_experts:
        reasons.append(
            f"upcycle.num_experts is {config.num_experts}; {target.architecture} needs at least "
            f"{target.min_experts}, which its gate compares"
        )
    if config.shared_expert != "none" and target.shared is None:
        reasons.append(
            f"upcycle.shared_expert is {config.shared_expert}; {target.architecture} needs none: it has no shared "
            "expert"
        )
    if target.top_1 and config.num_experts_per_tok != 1:
        k = config.num_experts_per_tok
        reasons.append(
            f"upcycle.num_experts_per_tok is {k}; {target.architecture} needs 1: each token visits one expert"
        )
    if target.top_1 and config.experts.kind != "copies":
        kind = config.experts.kind
        reasons.append(
            f"upcycle.experts.kind is {kind}; {target.architecture} needs copies: one expert a token must be the "
            "whole FFN"
        )
    return reasons


def resolve_layers(layers: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The numbers of the layers that get experts.

    Raises:
        UpcycleError: a number is beyond the last layer, or none is left.
    """
    match layers:
        case "all":
            return tuple(range(num_layers))
        case "last-half":
            return tuple(range(num_layers // 2, num_layers))
        case str():
            step = int(layers.removeprefix("every-"))
            chosen = tuple(range(step - 1, num_layers, step))
        case _:
            chosen = tuple(sorted(layers))
    if not chosen or chosen[-1] >= num_layers:
        named = layers if isinstance(layers, str) else f"layer {chosen[-1]}"
        raise UpcycleError(
            f"upcycle.layers: {named} is not in a model of {num_layers} layers; must be of 0 to {num_layers - 1}"
        )
    return chosen


def _shown(layers: str | tuple[int, ...]) -> str:
    return layers if isinstance(layers, str) else str(list(layers))


_DECODER_FIELDS = (
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
_WIDTH = ("intermediate_size",)  # becomes the experts' width
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}
_MLP_BIAS = Required(False, "no mixture-of-experts architecture of transformers has expert biases with this FFN")


def _partial_rotary(config: Any) -> float:
    return float((config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


_WHOLE_ROTARY = Condition(
    lambda c: _partial_rotary(c) == 1.0,
    lambda c: f"partial_rotary_factor is {_partial_rotary(c)}; it must be 1: the targets rotate whole heads",
)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _granite_of_llama(config: Any) -> dict[str, Any]:
    """Granite's multipliers, so that they do nothing, and its attention scale so that it is Llama's."""
    return {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": _head_dim(config) ** -0.5,
        "head_dim": _head_dim(config),
    }


def _qwen2_moe_of_llama(config: Any) -> dict[str, Any]:
    layers = ["full_attention"] * config.num_hidden_layers
    return {"qkv_bias": False, "layer_types": layers, "head_dim": _head_dim(config), **_NO_WINDOW}


def _qwen2_moe_of_windowed(config: Any) -> dict[str, Any]:
    """Mistral and Phi-3 have one window for all layers; Qwen2-MoE says it for each."""
    if config.sliding_window is None:
        return _qwen2_moe_of_llama(config)
    window = {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_hidden_layers,
    }
    return {**_qwen2_moe_of_llama(config), **window, "layer_types": ["sliding_attention"] * config.num_hidden_layers}


def _glm4_moe(config: Any) -> dict[str, Any]:
    """GLM-4-MoE rotates half of each head unless it is told otherwise, and looks for it among the rotary parameters."""
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    return {"rope_parameters": rope, "head_dim": _head_dim(config), "attention_bias": False, "use_qk_norm": False}


def _longrope(config: Any) -> dict[str, Any]:
    """Phi-3 keeps the length that a long rotary embedding stretches beside its rotary parameters.

    The targets look for it among them.
    They also check the number of its factors, for which they want the size of a head.
    """
    rope = dict(config.rope_parameters)
    if rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings
    return {"rope_parameters": rope, "head_dim": _head_dim(config)}


def _qwen3_window(config: Any) -> dict[str, Any]:
    window = config.sliding_window if "sliding_attention" in config.layer_types else None
    return {"use_sliding_window": window is not None, "sliding_window": window}


def _unwindowed_layers(config: Any) -> bool:
    return "sliding_attention" not in config.layer_types


_NO_WINDOWS = Condition(
    _unwindowed_layers,
    lambda c: (
        f"layer_types has {c.layer_types.count('sliding_attention')} layers with a window; Glm4MoeForCausalLM needs "
        "none: it has no windows"
    ),
)
_WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def _uniform_layers(config: Any) -> bool:
    return len(set(config.layer_types)) == 1


_GEMMA_REQUIRED = {"attention_bias": Required(False, "its attention has no biases")}
_GEMMA_CAUSAL = Condition(
    lambda c: not c.use_bidirectional_attention,
    lambda c: "use_bidirectional_attention is True; it must be False: the targets are causal decoders",
)
_GEMMA_TIED = Condition(
    lambda c: c.tie_word_embeddings,
    lambda c: "tie_word_embeddings is False; it must be True: Gemma's head is its embedding",
)
_PHI3_REQUIRED = {
    "resid_pdrop": Required(0.0, "it has no dropout after a block"),
    "embd_pdrop": Required(0.0, "it has no dropout after the embedding"),
}
_WITHOUT_ROPE = tuple(name for name in _DECODER_FIELDS if name != "rope_parameters")
_UNTIED = tuple(name for name in _DECODER_FIELDS if name != "tie_word_embeddings")
_T5_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "use_cache",
    "pad_token_id",
    "eos_token_id",
)

CONVERSIONS: tuple[Conversion, ...] = (
    Conversion(
        LLAMA,
        MIXTRAL,
        carried=(*_DECODER_FIELDS, "head_dim"),
        required={
            "attention_bias": Required(False, "Mixtral's attention has no biases"),
            "mlp_bias": _MLP_BIAS,
        },
        conditions=(_WHOLE_ROTARY,),
        derived=lambda _: {"sliding_window": None},
        consumed=_WIDTH,
        neutral=("pretraining_tp",),  # read by no model of transformers 5
    ),
    Conversion(
        LLAMA,
        QWEN2_MOE,
        carried=_DECODER_FIELDS,
        required={
            "attention_bias": Required(False, "its attention has no bias after the output projection"),
            "mlp_bias": _MLP_BIAS,
        },
        conditions=(_WHOLE_ROTARY,),
        derived=_qwen2_moe_of_llama,
        consumed=(*_WIDTH, "head_dim"),
        neutral=("pretraining_tp",),  # read by no model of transformers 5
    ),
    Conversion(
        LLAMA,
        GRANITE_MOE,
        carried=(*_DECODER_FIELDS, "attention_bias"),
        required={"mlp_bias": _MLP_BIAS},
        conditions=(_WHOLE_ROTARY,),
        derived=_granite_of_llama,
        consumed=(*_WIDTH, "head_dim"),
        neutral=("pretraining_tp",),  # read by no model of transformers 5
    ),
    Conversion(
        LLAMA,
        GRANITE_MOE_SHARED,
        carried=(*_DECODER_FIELDS, "attention_bias"),
        required={"mlp_bias": _MLP_BIAS},
        conditions=(_WHOLE_ROTARY,),
        derived=_granite_of_llama,
        consumed=(*_WIDTH, "head_dim"),
        neutral=("pretraining_tp",),  # read by no model of transformers 5
    ),
    Conversion(
        MISTRAL,
        MIXTRAL,
        carried=(*_DECODER_FIELDS, "head_dim", "sliding_window"),
        conditions=(_WHOLE_ROTARY,),
        consumed=_WIDTH,
    ),
    Conversion(
        MISTRAL,
        QWEN2_MOE,
        carried=_DECODER_FIELDS,
        conditions=(_WHOLE_ROTARY,),
        derived=_qwen2_moe_of_windowed,
        consumed=(*_WIDTH, "head_dim", "sliding_window"),
    ),
    Conversion(
        PHI3,
        MIXTRAL,
        carried=(*_WITHOUT_ROPE, "sliding_window"),
        required=_PHI3_REQUIRED,
        conditions=(_WHOLE_ROTARY,),
        derived=_longrope,
        consumed=(*_WIDTH, "rope_parameters", "original_max_position_embeddings"),
    ),
    Conversion(
        PHI3,
        QWEN2_MOE,
        carried=_WITHOUT_ROPE,
        required=_PHI3_REQUIRED,
        conditions=(_WHOLE_ROTARY,),
        derived=lambda c: {**_qwen2_moe_of_windowed(c), **_longrope(c)},
        consumed=(*_WIDTH, "rope_parameters", "original_max_position_embeddings", "sliding_window"),
    ),
    Conversion(
        GEMMA,
        MIXTRAL,
        carried=(*_UNTIED, "head_dim"),
        required=_GEMMA_REQUIRED,
        conditions=(_WHOLE_ROTARY, _GEMMA_CAUSAL, _GEMMA_TIED),
        derived=lambda _: {"sliding_window": None, "tie_word_embeddings": False},
        consumed=(*_WIDTH, "tie_word_embeddings", "use_bidirectional_attention"),
        zero_router="rounding",
    ),
    Conversion(
        GEMMA,
        QWEN2_MOE,
        carried=_UNTIED,
        required=_GEMMA_REQUIRED,
        conditions=(_WHOLE_ROTARY, _GEMMA_CAUSAL, _GEMMA_TIED),
        derived=lambda c: {**_qwen2_moe_of_llama(c), "tie_word_embeddings": False},
        consumed=(*_WIDTH, "head_dim", "tie_word_embeddings", "use_bidirectional_attention"),
        zero_router="rounding",
    ),
    Conversion(
        QWEN2,
        QWEN2_MOE,
        carried=(*_DECODER_FIELDS, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        conditions=(_WHOLE_ROTARY,),
        derived=lambda _: {"qkv_bias": True},
        consumed=_WIDTH,
        optional=("head_dim",),
    ),
    Conversion(
        QWEN3,
        QWEN3_MOE,
        carried=(*_DECODER_FIELDS, "attention_bias"),
        conditions=(
            _WHOLE_ROTARY,
            Condition(
                _uniform_layers,
                lambda c: (
                    f"layer_types has {c.layer_types.count('sliding_attention')} layers with a window and others "
                    "without; "
                    "Qwen3MoeForCausalLM needs one kind: it has one window for all layers"
                ),
            ),
        ),
        derived=lambda c: {**_qwen3_window(c), "head_dim": c.head_dim},
        consumed=(*_WIDTH, "head_dim", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
    Conversion(
        OLMO2,
        FLEX_OLMO,
        carried=(*_DECODER_FIELDS, "attention_bias"),
        conditions=(_WHOLE_ROTARY,),
        consumed=_WIDTH,
        optional=("head_dim",),
    ),
    *(
        Conversion(
            GRANITE,
            target,
            carried=(
                *_DECODER_FIELDS,
                "attention_bias",
                "embedding_multiplier",
                "logits_scaling",
                "residual_multiplier",
                "attention_multiplier",
            ),
            required={"mlp_bias": _MLP_BIAS},
            conditions=(_WHOLE_ROTARY,),
            consumed=_WIDTH,
            optional=("head_dim",),
        )
        for target in (GRANITE_MOE, GRANITE_MOE_SHARED)
    ),
    Conversion(
        LLAMA,
        GLM4_MOE,
        carried=_WITHOUT_ROPE,
        required={
            "attention_bias": Required(False, "its attention has no bias after the output projection"),
            "mlp_bias": _MLP_BIAS,
        },
        conditions=(_WHOLE_ROTARY,),
        derived=_glm4_moe,
        consumed=(*_WIDTH, "head_dim", "rope_parameters"),
        by_name_alone=True,
        neutral=("pretraining_tp",),  # read by no model of transformers 5
    ),
    Conversion(
        MISTRAL,
        GLM4_MOE,
        carried=_WITHOUT_ROPE,
        required={"sliding_window": Required(None, "its attention has no window")},
        conditions=(_WHOLE_ROTARY,),
        derived=_glm4_moe,
        consumed=(*_WIDTH, "head_dim", "rope_parameters"),
        by_name_alone=True,
    ),
    Conversion(
        QWEN2,
        GLM4_MOE,
        carried=_WITHOUT_ROPE,
        conditions=(_WHOLE_ROTARY, _NO_WINDOWS),
        derived=lambda c: {**_glm4_moe(c), "attention_bias": True},
        consumed=(*_WIDTH, "rope_parameters", *_WINDOW_FIELDS),
        by_name_alone=True,
    ),
    Conversion(
        QWEN3,
        GLM4_MOE,
        carried=_WITHOUT_ROPE,
        required={"attention_bias": Required(False, "its attention has no bias after the output projection")},
        conditions=(_WHOLE_ROTARY, _NO_WINDOWS),
        derived=lambda c: {**_glm4_moe(c), "use_qk_norm": True},
        consumed=(*_WIDTH, "head_dim", "rope_parameters", *_WINDOW_FIELDS),
        by_name_alone=True,
    ),
    Conversion(
        T5,
        SWITCH_TRANSFORMERS,
        carried=_T5_FIELDS,
        conditions=(
            Condition(
                lambda c: not c.is_gated_act,
                lambda c: (
                    f"feed_forward_proj is {c.feed_forward_proj}; SwitchTransformersForConditionalGeneration needs "
                    "one without a gate"
                ),
            ),
            Condition(
                lambda c: c.scale_decoder_outputs,
                lambda c: (
                    "tie_word_embeddings is False; SwitchTransformersForConditionalGeneration needs True: it scales "
                    "what a tied head reads"
                ),
            ),
        ),
        derived=lambda c: {"dense_act_fn": c.dense_act_fn, "tie_word_embeddings": True},
        consumed=("d_ff", "feed_forward_proj"),
        optional=("decoder_start_token_id",),
        neutral=("classifier_dropout", "is_decoder"),
        zero_router="rounding",
    ),
)

# Fields of every PreTrainedConfig: bookkeeping, generation defaults and class labels, none read by a decoder's forward
# pass.
COMMON_NEUTRAL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "model_type",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "_from_model_config",
    }
)


def find_family(model_type: str, architectures: Any, where: str, config: Any = None) -> DenseFamily:
    """The family of a config.

    `where` names it in a refusal, and what it holds tells what is missing of a family that no table names.

    Raises:
        UpcycleError: `architectures` is neither None nor a list of names; no family covers it: says why, where that is
            known, and what is supported.
    """
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise UpcycleError(
            f"{where}: architectures is {shorten(repr(architectures))}; it must be a list of class names, such as "
            "['LlamaForCausalLM']"
        )
    for family in DENSE_FAMILIES:
        if family.model_type == model_type and (not architectures or family.architecture in architectures):
            return family
    named = shorten(f"{architectures[0]} ({model_type})" if architectures else model_type)
    related = next((family for family in DENSE_FAMILIES if family.model_type == model_type), None)
    if related is not None:
        raise UpcycleError(
            f"{where}: {named} has another head than {related.architecture}; give the model with the head that the "
            "family was trained with"
        )
    if (known := NO_TWIN.get(model_type)) is not None:
        nearest = f"; the nearest target is {known.nearest}" if known.nearest else ""
        raise UpcycleError(
            f"{where}: {named} has {known.reason}; no mixture-of-experts architecture of transformers holds "
            f"that{nearest}"
        )
    values = vars(config) if config is not None else {}
    if any(isinstance(count := values.get(name), int) and count > 1 for name in EXPERT_COUNTS):
        raise UpcycleError(
            f"{where}: {named} is a mixture of experts already; give a dense model, such as the one that it was made "
            "from"
        )
    supported = ", ".join(family.architecture for family in DENSE_FAMILIES)
    if reasons := [trait.reason for trait in TRAITS if any(values.get(name) for name in trait.fields)]:
        raise UpcycleError(
            f"{where}: {named} has {' and '.join(reasons[:2])}, which no target has that can be upcycled to; "
            f"supported: {supported}"
        )
    raise UpcycleError(
        f"{where}: {named} cannot be upcycled: no table says what its tensors and config values mean; supported: "
        f"{supported}"
    )


def choose_conversion(source: Any, config: UpcycleConfig, where: str) -> Conversion:
    """The first conversion that holds the source with these settings, or the one asked for.

    `where` names the config in a refusal.

    Raises:
        UpcycleError: none does; the reasons are those of the target that comes nearest, the one with the fewest. A
            layer is not in the source.
    """
    family = find_family(source.model_type, source.architectures, where, source)
    rows = [row for row in CONVERSIONS if row.family is family]
    if config.target != "auto":
        asked = [row for row in rows if row.target.model_type == config.target]
        if not asked:
            names = ", ".join(row.target.model_type for row in rows)
            raise UpcycleError(f"{where}: upcycle.target is {config.target}; {family.architecture} can become {names}")
        rows = asked
    else:
        rows = [row for row in rows if not row.by_name_alone]
    refused = [(row, row.refusals(source, config)) for row in rows]
    fitting = next((row for row, reasons in refused if not reasons), None)
    if fitting is not None:
        return fitting
    nearest, reasons = min(refused, key=lambda pair: len(pair[1]))
    others = f" (the nearest target is {nearest.target.model_type})" if len(rows) > 1 else ""
    raise UpcycleError(f"{where}: {'; '.join(reasons)}{others}")
