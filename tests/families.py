"""The table of families for tests: what each dense model says, what it becomes, and what would be lost on the way.

A new family is one row here, and a new target one of `SPARSE`. `test_plan.py` and `test_target_config.py` ask every row
about plans and configs, `test_families.py` about the function, `test_decoder_families.py` about packages,
`test_tracing.py` about classes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Sparse:
    """A target. `model` are config values of a small one, beside those of any small decoder.

    shared: it can have an expert that every token visits. partial: it can have experts in every second layer.
    """

    model: Mapping[str, Any]
    shared: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Becomes:
    """A target of a family: what its config must say of the talkative source beside what it carries over.

    says: what the talkative source says otherwise, because this target could not hold it, or holds more than others.
    needs: what every source of the family must say for this target.
    """

    derived: Mapping[str, Any]
    says: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A dense model whose function its mixture must keep, and config values of the mixture that would break it.

    dense: what of its config could be lost. settings: of upcycling; they lead to `target`.
    exact: a zero router must give the very bits of the dense model.
    architecture: the one of the family, filled in.
    """

    target: str
    sprung: tuple[Mapping[str, Any], ...]
    dense: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    architecture: str = ""


@dataclass(frozen=True)
class Exported:
    """A dense model that is exported: its config, how it is upcycled (None: not at all), the target that this makes.

    architecture: the one of the family, filled in.
    """

    overrides: dict[str, Any]
    upcycle: dict[str, Any] | None
    target: str
    architecture: str = ""


@dataclass(frozen=True)
class Family:
    """A dense architecture. `talkative` are values of its config that are no default of it nor of a target."""

    architecture: str
    talkative: Mapping[str, Any]
    targets: Mapping[str, Becomes]
    kept: Mapping[str, Kept]
    exported: Mapping[str, Exported] = field(default_factory=dict)


WINDOW = 12  # shorter than the text of every test
NUM_LAYERS = 4
UNTIED = {"tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
NOT_RENORMALIZED = {"norm_topk_prob": False}
NO_WINDOW_IN_ANY_LAYER = {"layer_types": ["full_attention"] * NUM_LAYERS}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

_DECODER = {
    "hidden_act": "relu",
    "rms_norm_eps": 1e-3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 99,
    "attention_dropout": 0.25,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 3,
    "eos_token_id": [1, 3],
    "use_cache": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}
_NO_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "head_dim": 16,
}
# 0 is Qwen2-MoE's None
_FULL = {
    "layer_types": ["full_attention"] * 3,
    "use_sliding_window": False,
    "sliding_window": 0,
    "qkv_bias": False,
}
_WINDOWED = {
    "layer_types": ["sliding_attention"] * 3,
    "use_sliding_window": True,
    "sliding_window": 17,
    "qkv_bias": False,
}
_PHI3_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 1.0},
    "head_dim": 8,
}
_GLM4 = {
    "attention_bias": False,
    "use_qk_norm": False,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "intermediate_size": 48,
}

SPARSE: Mapping[str, Sparse] = {
    "mixtral": Sparse({"num_local_experts": 4}),
    "qwen2_moe": Sparse(
        {
            "num_experts": 4,
            "decoder_sparse_step": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
        },
        shared=True,
        partial=True,
    ),
    "qwen3_moe": Sparse(
        {"num_experts": 4, "mlp_only_layers": [0], "moe_intermediate_size": 24, "attention_bias": True}, partial=True
    ),
    "granitemoe": Sparse({"num_local_experts": 4, "attention_bias": True, "tie_word_embeddings": True}),
    "granitemoeshared": Sparse({"num_local_experts": 4, "shared_intermediate_size": 16}, shared=True),
    "glm4_moe": Sparse(
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
        shared=True,
    ),
    "flex_olmo": Sparse({"num_experts": 4}),
    "switch_transformers": Sparse({"num_experts": 4}, partial=True),
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        talkative={**_DECODER, "head_dim": 16},
        targets={
            "mixtral": Becomes({"sliding_window": None, "router_jitter_noise": 0.0}),
            "qwen2_moe": Becomes(
                {
                    **_FULL,
                    "head_dim": 16,
                    "norm_topk_prob": True,
                    "mlp_only_layers": [],
                    "intermediate_size": 48,
                }
            ),
            "granitemoe": Becomes(_NO_MULTIPLIERS, says={"attention_bias": True}),
            "granitemoeshared": Becomes(
                {**_NO_MULTIPLIERS, "shared_intermediate_size": 0}, says={"attention_bias": True}
            ),
            "glm4_moe": Becomes({**_GLM4, "head_dim": 16}),
        },
        kept={
            "llama, tied": Kept("mixtral", ({"tie_word_embeddings": False}, {"rms_norm_eps": 0.3})),
            "llama, untied, llama3 rope, wide heads": Kept(
                "mixtral",
                (PLAIN_ROPE, {"head_dim": None}),
                UNTIED | {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
            ),
            "llama, attention biases": Kept(
                "granitemoe",
                ({"attention_bias": False}, {"attention_multiplier": 1.0}, {"logits_scaling": 8.0}),
                {"attention_bias": True, "head_dim": 16},
            ),
            "llama, some layers": Kept(
                "qwen2_moe",
                (NOT_RENORMALIZED, {"mlp_only_layers": []}, {"head_dim": 8}),
                {"head_dim": 16},
                {"layers": "every-2"},
            ),
            "llama, a half shared": Kept("qwen2_moe", (NOT_RENORMALIZED,), {}, {"shared_expert": "half"}, exact=False),
            "llama, a silent shared expert": Kept("qwen2_moe", (NOT_RENORMALIZED,), {}, {"shared_expert": "zero"}),
            "llama, attention biases, a half shared": Kept(
                "granitemoeshared",
                ({"shared_intermediate_size": 0}, {"attention_bias": False}),
                {"attention_bias": True},
                {"shared_expert": "half"},
                exact=False,
            ),
            "llama, attention biases, a silent shared expert": Kept(
                "granitemoeshared",
                ({"attention_multiplier": 1.0},),
                {"attention_bias": True},
                {"shared_expert": "zero"},
            ),
            "llama, a selection bias, llama3 rope, wide heads": Kept(
                "glm4_moe",
                (HALF_ROTARY, {"routed_scaling_factor": 2.0}),  # two sigmoids of zero are one, renormalized or not
                UNTIED | {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
                {"target": "glm4_moe"},
            ),
            "llama, a selection bias, the last layers": Kept(
                "glm4_moe",
                (HALF_ROTARY, {"first_k_dense_replace": 0}),
                {},
                {"target": "glm4_moe", "layers": "last-half"},
            ),
        },
        exported={
            "llama, some layers": Exported({"num_hidden_layers": 4}, {"layers": "every-2"}, "qwen2_moe"),
            "llama, half shared": Exported({"tie_word_embeddings": False}, {"shared_expert": "half"}, "qwen2_moe"),
            "llama, attention bias": Exported({"attention_bias": True, "head_dim": 16}, {}, "granitemoe"),
            "llama, a selection bias, some layers, half shared": Exported(
                {"num_hidden_layers": 4, "tie_word_embeddings": False},
                {"target": "glm4_moe", "layers": "last-half", "shared_expert": "half"},
                "glm4_moe",
            ),
            "llama, dense": Exported({}, None, "llama"),
            "llama, dense with attention bias": Exported(
                {"attention_bias": True, "tie_word_embeddings": False}, None, "llama"
            ),
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        talkative={**_DECODER, "head_dim": 16, "sliding_window": 17},
        targets={
            "mixtral": Becomes({"router_jitter_noise": 0.0}),
            "qwen2_moe": Becomes({**_WINDOWED, "head_dim": 16, "norm_topk_prob": True}),
            "glm4_moe": Becomes(
                {**_GLM4, "head_dim": 16}, says={"sliding_window": None}, needs={"sliding_window": None}
            ),
        },
        kept={
            "mistral, window": Kept(
                "mixtral",
                ({"sliding_window": None},),
                UNTIED | {"sliding_window": WINDOW, "head_dim": 16},
            ),
            "mistral, window, one layer": Kept(
                "qwen2_moe", (NO_WINDOW_IN_ANY_LAYER,), {"sliding_window": WINDOW}, {"layers": [1]}
            ),
            "mistral, no window, one layer": Kept(
                "qwen2_moe", (NOT_RENORMALIZED,), {"sliding_window": None}, {"layers": [1]}
            ),
            "mistral, a selection bias, a half shared": Kept(
                "glm4_moe",
                (HALF_ROTARY, {"n_shared_experts": 0}),
                {"sliding_window": None},
                {"target": "glm4_moe", "shared_expert": "half"},
                exact=False,
            ),
        },
        exported={
            "mistral, window": Exported({"sliding_window": WINDOW, "head_dim": 16}, {}, "mixtral"),
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        talkative={**_DECODER, "sliding_window": 17},
        targets={
            "mixtral": Becomes(_PHI3_ROPE),
            "qwen2_moe": Becomes({**_WINDOWED, **_PHI3_ROPE, "norm_topk_prob": True}),
        },
        kept={
            "phi3, window": Kept("mixtral", ({"sliding_window": None},), UNTIED | {"sliding_window": WINDOW}),
            "phi3, longrope": Kept(
                "mixtral",
                (PLAIN_ROPE,),
                {"original_max_position_embeddings": 32, "rope_parameters": LONG_ROPE, "sliding_window": None},
            ),
            "phi3, window, half of the layers": Kept(
                "qwen2_moe", (NO_WINDOW_IN_ANY_LAYER,), {"sliding_window": WINDOW}, {"layers": "last-half"}
            ),
            "phi3, longrope, half of the layers": Kept(
                "qwen2_moe",
                (PLAIN_ROPE,),
                {"original_max_position_embeddings": 32, "rope_parameters": LONG_ROPE, "sliding_window": None},
                {"layers": "last-half"},
            ),
        },
        exported={
            "phi3": Exported({"sliding_window": WINDOW}, {}, "mixtral"),
        },
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        talkative={**_DECODER, "head_dim": 16},
        targets={
            "mixtral": Becomes({"sliding_window": None, "tie_word_embeddings": False}),
            "qwen2_moe": Becomes({**_FULL, "head_dim": 16, "tie_word_embeddings": False, "norm_topk_prob": True}),
        },
        kept={
            "gemma": Kept("mixtral", ({"hidden_act": "silu"}, {"head_dim": None}), {"head_dim": 16}, exact=False),
            "gemma, some layers": Kept(
                "qwen2_moe",
                ({"hidden_act": "silu"}, NOT_RENORMALIZED),
                {"head_dim": 16},
                {"layers": [0, 3]},
                exact=False,
            ),
        },
        exported={
            "gemma, tanh GELU": Exported({"head_dim": 16}, {}, "mixtral"),
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        talkative={
            **_DECODER,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 1,
        },
        targets={
            "qwen2_moe": Becomes(
                {
                    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                    "qkv_bias": True,
                    "head_dim": 16,
                    "norm_topk_prob": True,
                    "shared_expert_intermediate_size": 0,
                }
            ),
            "glm4_moe": Becomes(
                {**_GLM4, "attention_bias": True}, says={"use_sliding_window": False, "sliding_window": None}
            ),
        },
        kept={
            "qwen2, biases": Kept("qwen2_moe", (NOT_RENORMALIZED, {"qkv_bias": False}), UNTIED),
            "qwen2, windows in half of the layers, a half shared": Kept(
                "qwen2_moe",
                (NO_WINDOW_IN_ANY_LAYER, {"layer_types": ["sliding_attention"] * NUM_LAYERS}),
                {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
                {"layers": "every-2", "shared_expert": "half"},
                exact=False,
            ),
            "qwen2, a selection bias, a silent shared expert": Kept(
                "glm4_moe",
                (HALF_ROTARY, {"attention_bias": False}),
                {},
                {"target": "glm4_moe", "shared_expert": "zero"},
            ),
        },
        exported={
            "qwen2, biases": Exported({}, {}, "qwen2_moe"),
            "qwen2, windows by layer": Exported(
                {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "num_hidden_layers": 4},
                {"layers": [1, 3], "shared_expert": "half"},
                "qwen2_moe",
            ),
            "qwen2, a selection bias": Exported({}, {"target": "glm4_moe"}, "glm4_moe"),
        },
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        talkative={
            **_DECODER,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 0,
        },
        targets={
            "qwen3_moe": Becomes(
                {
                    "use_sliding_window": True,
                    "sliding_window": 17,
                    "head_dim": 16,
                    "norm_topk_prob": True,
                    "decoder_sparse_step": 1,
                }
            ),
            "glm4_moe": Becomes(
                {**_GLM4, "head_dim": 16, "use_qk_norm": True},
                says={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
            ),
        },
        kept={
            "qwen3, wide heads, attention biases": Kept(
                "qwen3_moe",
                (NOT_RENORMALIZED, {"attention_bias": False}, {"head_dim": 8}),
                UNTIED | {"head_dim": 16, "attention_bias": True},
            ),
            "qwen3, tied, some layers": Kept(
                "qwen3_moe",
                ({"tie_word_embeddings": False}, {"mlp_only_layers": []}),
                {"head_dim": 16},
                {"layers": "every-2"},
            ),
            "qwen3, windows in all layers": Kept(
                "qwen3_moe",
                ({"use_sliding_window": False},),
                {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
            ),
            "qwen3, a selection bias": Kept(
                "glm4_moe",
                (HALF_ROTARY, {"use_qk_norm": False}),
                UNTIED | {"head_dim": 16},
                {"target": "glm4_moe"},
            ),
        },
        exported={
            "qwen3, q and k norms, some layers": Exported(
                {"head_dim": 16, "num_hidden_layers": 4}, {"layers": "last-half"}, "qwen3_moe"
            ),
            "qwen3, biases and window": Exported(
                {
                    "head_dim": 24,
                    "attention_bias": True,
                    "use_sliding_window": True,
                    "sliding_window": WINDOW,
                    "max_window_layers": 0,
                },
                {},
                "qwen3_moe",
            ),
            "qwen3, a selection bias": Exported({"head_dim": 24}, {"target": "glm4_moe"}, "glm4_moe"),
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        talkative={**_DECODER, "head_dim": 16, "attention_bias": True},
        targets={
            "flex_olmo": Becomes({"head_dim": 16, "norm_topk_prob": True}),
        },
        kept={
            # the norm after the FFN takes out the factor that weights leave without renormalizing: no trap here
            "olmo2": Kept(
                "flex_olmo",
                (PLAIN_ROPE, {"rms_norm_eps": 0.3}, {"hidden_act": "gelu"}),
                UNTIED | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            ),
        },
        exported={
            "olmo2, norms after": Exported({}, {}, "flex_olmo"),
        },
    ),
    "granite": Family(
        "GraniteForCausalLM",
        talkative={
            **_DECODER,
            "head_dim": 16,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        targets={
            "granitemoe": Becomes({"head_dim": 16}),
            "granitemoeshared": Becomes({"head_dim": 16, "shared_intermediate_size": 0}),
        },
        kept={
            "granite, multipliers": Kept(
                "granitemoe",
                tuple({name: 1.0} for name in MULTIPLIERS),
                UNTIED | MULTIPLIERS | {"attention_bias": True},
            ),
            "granite, multipliers, a half shared": Kept(
                "granitemoeshared",
                (*({name: 1.0} for name in MULTIPLIERS), {"shared_intermediate_size": 0}),
                MULTIPLIERS,
                {"shared_expert": "half"},
                exact=False,
            ),
        },
        exported={
            "granite, multipliers": Exported(
                {
                    "embedding_multiplier": 3.0,
                    "logits_scaling": 2.0,
                    "residual_multiplier": 0.5,
                    "attention_multiplier": 0.2,
                    "attention_bias": True,
                },
                {},
                "granitemoe",
            ),
            "granite, shared": Exported({"residual_multiplier": 0.5}, {"shared_expert": "half"}, "granitemoeshared"),
        },
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        talkative={
            "d_kv": 16,
            "num_heads": 3,
            "num_decoder_layers": 3,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 65,
            "dropout_rate": 0.25,
            "layer_norm_epsilon": 1e-3,
            "initializer_factor": 0.5,
            "feed_forward_proj": "gelu",
            "use_cache": False,
            "pad_token_id": 2,
            "eos_token_id": 3,
            "decoder_start_token_id": 5,
        },
        targets={
            "switch_transformers": Becomes(
                {
                    "dense_act_fn": "gelu",
                    "decoder_start_token_id": 5,
                    "tie_word_embeddings": True,
                    "num_sparse_encoder_layers": 4,
                    "num_sparse_decoder_layers": 3,
                    "expert_capacity": 1_000_000_000,
                    "router_bias": False,
                    "router_dtype": "float32",
                    "router_jitter_noise": 0.0,
                }
            ),
        },
        kept={
            "t5": Kept(
                "switch_transformers",
                ({"expert_capacity": 1}, {"dense_act_fn": "gelu"}),
                {},
                {"num_experts_per_tok": 1},
                exact=False,
            ),
            "t5, some layers": Kept(
                "switch_transformers",
                ({"expert_capacity": 1}, {"tie_word_embeddings": False}),
                {},
                {"num_experts_per_tok": 1, "layers": "every-2"},
                exact=False,
            ),
        },
    ),
}

KEPT: Mapping[str, Kept] = {
    name: replace(case, architecture=family.architecture)
    for family in FAMILIES.values()
    for name, case in family.kept.items()
}
EXPORTED: Mapping[str, Exported] = {
    name: replace(case, architecture=family.architecture)
    for family in FAMILIES.values()
    for name, case in family.exported.items()
}
