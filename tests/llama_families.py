"""Rows of the table of families for tests: Llama and its kin."""

from __future__ import annotations

from collections.abc import Mapping

from family_records import (
    BOTH_WAYS,
    BOTH_WAYS_LOST,
    DECODER,
    FULL,
    GLM4,
    HALF_ROTARY,
    LLAMA3_ROPE,
    LONG_ROPE,
    NO_MULTIPLIERS,
    NO_WINDOW_IN_ANY_LAYER,
    NOT_RENORMALIZED,
    NUM_LAYERS,
    PHI3_ROPE,
    PLAIN_ROPE,
    UNTIED,
    WINDOW,
    WINDOWED,
    Becomes,
    Exported,
    Family,
    Kept,
)

LLAMA_FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        talkative={**DECODER, "head_dim": 16},
        targets={
            "mixtral": Becomes({"sliding_window": None, "router_jitter_noise": 0.0}),
            "qwen2_moe": Becomes(
                {
                    **FULL,
                    "head_dim": 16,
                    "norm_topk_prob": True,
                    "mlp_only_layers": [],
                    "intermediate_size": 48,
                }
            ),
            "granitemoe": Becomes(NO_MULTIPLIERS, says={"attention_bias": True}),
            "granitemoeshared": Becomes(
                {**NO_MULTIPLIERS, "shared_intermediate_size": 0}, says={"attention_bias": True}
            ),
            "glm4_moe": Becomes({**GLM4, "head_dim": 16}),
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
            "llama, both ways": Kept("mixtral", (BOTH_WAYS_LOST,), BOTH_WAYS),
            "llama, both ways, some layers": Kept("qwen2_moe", (BOTH_WAYS_LOST,), BOTH_WAYS, {"layers": [2]}),
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
        talkative={**DECODER, "head_dim": 16, "sliding_window": 17},
        targets={
            "mixtral": Becomes({"router_jitter_noise": 0.0}),
            "qwen2_moe": Becomes({**WINDOWED, "head_dim": 16, "norm_topk_prob": True}),
            "glm4_moe": Becomes(
                {**GLM4, "head_dim": 16}, says={"sliding_window": None}, needs={"sliding_window": None}
            ),
        },
        kept={
            "mistral, window": Kept(
                "mixtral",
                ({"sliding_window": None},),
                UNTIED | {"sliding_window": WINDOW, "head_dim": 16},
            ),
            "mistral, window, both ways": Kept(
                "mixtral", (BOTH_WAYS_LOST, {"sliding_window": None}), BOTH_WAYS | {"sliding_window": WINDOW}
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
        talkative={**DECODER, "sliding_window": 17},
        targets={
            "mixtral": Becomes(PHI3_ROPE),
            "qwen2_moe": Becomes({**WINDOWED, **PHI3_ROPE, "norm_topk_prob": True}),
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
        talkative={**DECODER, "head_dim": 16},
        targets={
            "mixtral": Becomes({"sliding_window": None, "tie_word_embeddings": False}),
            "qwen2_moe": Becomes({**FULL, "head_dim": 16, "tie_word_embeddings": False, "norm_topk_prob": True}),
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
            **DECODER,
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
                {**GLM4, "attention_bias": True}, says={"use_sliding_window": False, "sliding_window": None}
            ),
        },
        kept={
            "qwen2, biases": Kept("qwen2_moe", (NOT_RENORMALIZED, {"qkv_bias": False}), UNTIED),
            "qwen2, windows in half of the layers, both ways": Kept(
                "qwen2_moe",
                (BOTH_WAYS_LOST, NO_WINDOW_IN_ANY_LAYER),
                BOTH_WAYS | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
            ),
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
            **DECODER,
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
                {**GLM4, "head_dim": 16, "use_qk_norm": True},
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
            "qwen3, both ways": Kept("qwen3_moe", (BOTH_WAYS_LOST,), BOTH_WAYS | {"head_dim": 16}),
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
}
