"""Rows of the table of families for tests: other norms, other attention, encoders."""

from __future__ import annotations

from collections.abc import Mapping

from family_records import (
    BOTH_WAYS_LOST,
    DECODER,
    FULL,
    LONG,
    MULTIPLIERS,
    NO_WINDOW_IN_ANY_LAYER,
    NUM_LAYERS,
    PLAIN_ROPE,
    UNTIED,
    WINDOW,
    Becomes,
    Exported,
    Family,
    Kept,
)

OTHER_FAMILIES: Mapping[str, Family] = {
    "olmo2": Family(
        "Olmo2ForCausalLM",
        talkative={**DECODER, "head_dim": 16, "attention_bias": True},
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
            **DECODER,
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
    "granite_swa": Family(
        "GraniteSWAForCausalLM",
        talkative={
            **DECODER,
            **MULTIPLIERS,
            "head_dim": 16,
            "attention_bias": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "layer_rope_theta": [12345.0, 0, 99.0],
        },
        targets={"granitemoe_swa": Becomes({"head_dim": 16, "shared_intermediate_size": 0})},
        kept={
            "granite swa, windows, rotary bases by layer": Kept(
                "granitemoe_swa",
                (
                    *({name: 1.0} for name in MULTIPLIERS),
                    {"layer_rope_theta": [1e4] * NUM_LAYERS},
                    NO_WINDOW_IN_ANY_LAYER,
                ),
                UNTIED
                | MULTIPLIERS
                | {"attention_bias": True, "sliding_window": WINDOW, "layer_rope_theta": [0, 1e4, 100.0, 1e4]},
            ),
            "granite swa, a half shared": Kept(
                "granitemoe_swa",
                ({"shared_intermediate_size": 0},),
                {"sliding_window": WINDOW},
                {"shared_expert": "half"},
                exact=False,
            ),
        },
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        talkative={
            **{name: value for name, value in DECODER.items() if name != "rms_norm_eps"},
            "layer_norm_eps": 1e-3,
            "logit_scale": 0.5,
            "attention_bias": True,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        targets={
            "cohere2_moe": Becomes(
                {"head_dim": 8, "rms_norm_eps": None, "mlp_layer_types": ["sparse"] * 3, "num_shared_experts": 0}
            )
        },
        kept={
            "cohere2, windows in three of four layers": Kept(
                "cohere2_moe",
                ({"logit_scale": 0.0625}, {"sliding_window": LONG}, NO_WINDOW_IN_ANY_LAYER, {"layer_norm_eps": 0.3}),
                {"sliding_window": WINDOW, "logit_scale": 0.3, "attention_bias": True},
            ),
            # where a layer without experts would rotate, as in the first models of the target
            "cohere2, some layers": Kept(
                "cohere2_moe",
                ({"prefix_dense_sliding_window_pattern": 1}, {"mlp_layer_types": ["sparse"] * NUM_LAYERS}),
                {"sliding_window": WINDOW},
                {"layers": [0, 1]},
            ),
            "cohere2, a half shared": Kept(
                "cohere2_moe",
                ({"shared_expert_combination_strategy": "average"},),
                {"sliding_window": WINDOW},
                {"shared_expert": "half"},
                exact=False,
            ),
        },
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        talkative={**{name: value for name, value in DECODER.items() if name != "attention_dropout"}, "head_dim": 16},
        targets={
            "ernie4_5_moe": Becomes(
                {
                    "moe_num_shared_experts": 0,
                    "moe_layer_start_index": 0,
                    "moe_layer_end_index": 2,
                    "moe_layer_interval": 1,
                    "intermediate_size": 48,
                }
            )
        },
        kept={
            "ernie4.5, wide heads": Kept(
                "ernie4_5_moe", (PLAIN_ROPE, {"rms_norm_eps": 0.3}), UNTIED | {"head_dim": 16}
            ),
            "ernie4.5, some layers, a silent shared expert": Kept(
                "ernie4_5_moe",
                ({"moe_layer_interval": 1},),
                {"head_dim": 16},
                {"layers": "every-2", "shared_expert": "zero"},
            ),
        },
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        talkative={**DECODER, "head_dim": 16, "attention_bias": True, "eod_token_id": 7, "pretraining_tp": 2},
        targets={"hunyuan_v1_moe": Becomes({"head_dim": 16}, needs={"head_dim": 8})},
        kept={
            "hunyuan, a silent shared expert, a stretched base": Kept(
                "hunyuan_v1_moe",
                (PLAIN_ROPE, {"attention_bias": False}),
                UNTIED
                | {
                    "head_dim": 16,
                    "attention_bias": True,
                    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 100.0},
                },
                {"shared_expert": "zero"},
            ),
            "hunyuan, a half shared": Kept(
                "hunyuan_v1_moe", ({"rms_norm_eps": 0.3},), {"head_dim": 8}, {"shared_expert": "half"}, exact=False
            ),
        },
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        talkative={
            **{
                name: value
                for name, value in DECODER.items()
                if name not in ("hidden_act", "rms_norm_eps", "attention_dropout")
            },
            "head_dim": 16,
            "norm_eps": 1e-3,
            "conv_bias": True,
            "conv_L_cache": 4,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
        targets={
            "lfm2_moe": Becomes(
                {"num_dense_layers": 0, "use_expert_bias": True, "intermediate_size": 48, "head_dim": 16}
            )
        },
        kept={
            "lfm2, convolutions": Kept(
                "lfm2_moe",
                ({"conv_bias": False}, {"norm_eps": 0.3}, {"routed_scaling_factor": 2.0}),
                UNTIED | {"conv_bias": True, "layer_types": ["conv", "full_attention"] * 2},
                exact=False,
            ),
            "lfm2, the last layers": Kept(
                "lfm2_moe",
                ({"num_dense_layers": 0},),
                {"layer_types": ["full_attention", "conv"] * 2, "block_auto_adjust_ff_dim": False},
                {"layers": "last-half"},
                exact=False,
            ),
        },
    ),
    "eurobert": Family(
        "EuroBertForMaskedLM",
        talkative={**DECODER, "head_dim": 16},
        targets={
            "mixtral": Becomes({"sliding_window": None, "is_causal": False}),
            "qwen2_moe": Becomes({**FULL, "head_dim": 16, "norm_topk_prob": True, "is_causal": False}),
        },
        kept={
            "eurobert": Kept("mixtral", (BOTH_WAYS_LOST, {"head_dim": 8}), {"head_dim": 16}),
            "eurobert, some layers": Kept("qwen2_moe", (BOTH_WAYS_LOST,), UNTIED, {"layers": [1]}),
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
