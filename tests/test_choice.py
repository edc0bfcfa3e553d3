"""Every dense model becomes the first target that holds it, and what none can hold is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from families import SPARSE
from plans import every_conversion, refusal_of, source_of

from dense2moe.upcycle.building.choice import choose_conversion
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import CONVERSIONS, find_family

# The choice

MIXED_LAYERS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 20}
T5_SETTINGS: dict[str, Any] = {"num_experts_per_tok": 1}
SWITCH = {**T5_SETTINGS, "target": "switch_transformers"}


@pytest.mark.parametrize(
    ("architecture", "fields", "settings", "target"),
    [
        ("LlamaForCausalLM", {}, {}, "mixtral"),
        ("LlamaForCausalLM", {}, {"experts": ExpertsConfig(kind="granular", granularity=2)}, "mixtral"),
        ("LlamaForCausalLM", {}, {"layers": "last-half"}, "qwen2_moe"),
        ("LlamaForCausalLM", {}, {"layers": "every-1"}, "mixtral"),
        ("LlamaForCausalLM", {"num_hidden_layers": 3}, {"layers": (2, 0, 1)}, "mixtral"),
        ("LlamaForCausalLM", {"num_hidden_layers": 4}, {"layers": (2, 0, 1)}, "qwen2_moe"),
        ("LlamaForCausalLM", {"num_hidden_layers": 1}, {"layers": "last-half"}, "mixtral"),
        ("LlamaForCausalLM", {}, {"layers": (0, 3)}, "qwen2_moe"),
        ("LlamaForCausalLM", {}, {"shared_expert": "half"}, "qwen2_moe"),
        ("LlamaForCausalLM", {}, {"shared_expert": "zero", "layers": "every-2"}, "qwen2_moe"),
        ("LlamaForCausalLM", {"attention_bias": True}, {}, "granitemoe"),
        ("LlamaForCausalLM", {"attention_bias": True}, {"shared_expert": "half"}, "granitemoeshared"),
        ("MistralForCausalLM", {"sliding_window": 16}, {}, "mixtral"),
        ("MistralForCausalLM", {"sliding_window": 16}, {"layers": "every-2"}, "qwen2_moe"),
        ("Phi3ForCausalLM", {}, {}, "mixtral"),
        ("Phi3ForCausalLM", {}, {"shared_expert": "zero"}, "qwen2_moe"),
        ("GemmaForCausalLM", {}, {}, "mixtral"),
        ("GemmaForCausalLM", {}, {"layers": "last-half"}, "qwen2_moe"),
        ("Qwen2ForCausalLM", MIXED_LAYERS, {}, "qwen2_moe"),
        ("Qwen2ForCausalLM", {}, {"shared_expert": "half", "layers": "last-half"}, "qwen2_moe"),
        ("Qwen3ForCausalLM", {}, {"layers": "every-4"}, "qwen3_moe"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, {}, "qwen3_moe"),
        ("Olmo2ForCausalLM", {}, {}, "flex_olmo"),
        ("Olmo2ForCausalLM", {"num_hidden_layers": 2}, {"layers": (0, 1)}, "flex_olmo"),
        ("GraniteForCausalLM", {"attention_bias": True}, {}, "granitemoe"),
        ("GraniteForCausalLM", {}, {"shared_expert": "half"}, "granitemoeshared"),
        ("GraniteSWAForCausalLM", {}, {"shared_expert": "half"}, "granitemoe_swa"),
        ("Cohere2ForCausalLM", {}, {"layers": (0, 3)}, "cohere2_moe"),
        ("Ernie4_5ForCausalLM", {}, {"layers": (2, 3, 4)}, "ernie4_5_moe"),
        ("HunYuanDenseV1ForCausalLM", {}, {"shared_expert": "half"}, "hunyuan_v1_moe"),
        ("Lfm2ForCausalLM", {}, {"layers": "last-half"}, "lfm2_moe"),
        ("EuroBertForMaskedLM", {}, {}, "mixtral"),
        ("EuroBertModel", {}, {"layers": (0, 3)}, "qwen2_moe"),
        ("MistralForTokenClassification", {"sliding_window": 16}, {}, "mixtral"),
        ("LlamaForSequenceClassification", {}, {"shared_expert": "half"}, "qwen2_moe"),
        ("Qwen3ForQuestionAnswering", {}, {}, "qwen3_moe"),
        ("T5ForConditionalGeneration", {}, T5_SETTINGS, "switch_transformers"),
    ],
)
def test_the_first_target_that_holds_the_model_is_taken(
    architecture: str, fields: dict[str, Any], settings: dict[str, Any], target: str
) -> None:
    found = choose_conversion(source_of(architecture, **fields), UpcycleConfig(**settings), "config.json")
    assert found.family.architecture == architecture
    assert found.target.model_type == target


@every_conversion
def test_a_target_asked_for_by_name_is_taken(row: Conversion) -> None:
    config = UpcycleConfig(target=row.target.model_type, **SPARSE[row.target.model_type].settings)
    unwindowed = (
        {"sliding_window": None} if (row.family.model_type, row.target.model_type) == ("mistral", "glm4_moe") else {}
    )
    assert choose_conversion(source_of(row.family.architecture, **unwindowed), config, "config.json") is row


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_a_gate_with_a_selection_bias_is_never_chosen_by_auto(architecture: str) -> None:
    family = find_family(source_of(architecture).model_type, [architecture], "")
    assert [row.by_name_alone for row in CONVERSIONS if row.family is family].count(True) == 1
    assert all(row.by_name_alone == (row.target.model_type == "glm4_moe") for row in CONVERSIONS)
    held_by_none_else = (
        {"layers": "last-half", "shared_expert": "half"} if architecture == "Qwen3ForCausalLM" else {"num_experts": 4}
    )
    config = UpcycleConfig(**held_by_none_else)  # type: ignore[arg-type]
    if architecture == "Qwen3ForCausalLM":
        assert "Qwen3MoeForCausalLM needs none" in refusal_of(
            choose_conversion, source_of(architecture), config, "config.json"
        )
    else:
        assert choose_conversion(source_of(architecture), config, "config.json").target.model_type != "glm4_moe"


# Refusals

NO_MLP_BIAS = "no mixture-of-experts architecture of transformers has expert biases with this FFN"
BY_NAME = "; upcycle.target mixture would hold it"
NO_CLOSER = "the nearest target is mixtral"


@pytest.mark.parametrize(
    ("architecture", "fields", "settings", "message"),
    [
        (
            "LlamaForCausalLM",
            {"mlp_bias": True},
            {},
            f"mlp_bias is True; MixtralForCausalLM needs False: {NO_MLP_BIAS} ({NO_CLOSER})",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {},
            f"partial_rotary_factor is 0.5; it must be 1: the targets rotate whole heads ({NO_CLOSER})",
        ),
        (
            "LlamaForCausalLM",
            {"attention_bias": True},
            {"layers": "last-half"},
            "attention_bias is True; Qwen2MoeForCausalLM needs False: its attention has no bias after the output "
            "projection "
            "(the nearest target is qwen2_moe)",
        ),
        (
            "LlamaForCausalLM",
            {"attention_bias": True, "mlp_bias": True},
            {"target": "mixtral", "layers": (0, 3), "shared_expert": "half"},
            "attention_bias is True; MixtralForCausalLM needs False: Mixtral's attention has no biases; "
            f"mlp_bias is True; MixtralForCausalLM needs False: {NO_MLP_BIAS}; "
            "upcycle.layers is [0, 3]; MixtralForCausalLM needs all: it has experts in every layer; "
            "upcycle.shared_expert is half; MixtralForCausalLM needs none: it has no shared expert",
        ),
        (
            "LlamaForCausalLM",
            {},
            {"target": "mixtral", "shared_expert": "zero"},
            "upcycle.shared_expert is zero; MixtralForCausalLM needs none: it has no shared expert",
        ),
        (
            "LlamaForCausalLM",
            {},
            {"target": "qwen3_moe"},
            "upcycle.target is qwen3_moe; LlamaForCausalLM can become mixtral, qwen2_moe, granitemoe, "
            "granitemoeshared, glm4_moe, mixture",
        ),
        (
            "LlamaForCausalLM",
            {"num_hidden_layers": 4},
            {"target": "glm4_moe", "layers": (1, 3), "num_experts": 1, "num_experts_per_tok": 1},
            "upcycle.layers is [1, 3]; Glm4MoeForCausalLM needs layers up to the last: it has dense ones before them "
            "alone; "
            "upcycle.num_experts is 1; Glm4MoeForCausalLM needs at least 2, which its gate compares",
        ),
        (
            "MistralForCausalLM",
            {"sliding_window": 16},
            {"target": "glm4_moe"},
            "sliding_window is 16; Glm4MoeForCausalLM needs None: its attention has no window",
        ),
        (
            "Qwen3ForCausalLM",
            {
                "num_hidden_layers": 4,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
            },
            {"target": "glm4_moe"},
            "attention_bias is True; Glm4MoeForCausalLM needs False: its attention has no bias after the output "
            "projection; "
            "layer_types has 3 layers with a window; Glm4MoeForCausalLM needs none: it has no windows",
        ),
        (
            "Olmo2ForCausalLM",
            {},
            {"target": "mixtral"},
            "upcycle.target is mixtral; Olmo2ForCausalLM can become flex_olmo, mixture",
        ),
        (
            "MistralForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.25,
                }
            },
            {},
            f"partial_rotary_factor is 0.25; it must be 1: the targets rotate whole heads ({NO_CLOSER})",
        ),
        (
            "Phi3ForCausalLM",
            {"resid_pdrop": 0.1},
            {},
            "resid_pdrop is 0.1; MixtralForCausalLM needs 0.0: it has no dropout after attention and FFN "
            f"({NO_CLOSER})",
        ),
        (
            "Phi3ForCausalLM",
            {"embd_pdrop": 0.1},
            {},
            f"embd_pdrop is 0.1; MixtralForCausalLM needs 0.0: it has no dropout after the embedding ({NO_CLOSER})",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
            {},
            f"partial_rotary_factor is 0.75; it must be 1: the targets rotate whole heads ({NO_CLOSER})",
        ),
        (
            "GemmaForCausalLM",
            {"use_bidirectional_attention": True},
            {},
            f"use_bidirectional_attention is True; it must be False: the targets are causal decoders ({NO_CLOSER})",
        ),
        (
            "GemmaForCausalLM",
            {"tie_word_embeddings": False},
            {},
            f"tie_word_embeddings is False; it must be True: Gemma's head is its embedding ({NO_CLOSER})",
        ),
        (
            "GemmaForCausalLM",
            {"attention_bias": True},
            {},
            f"attention_bias is True; MixtralForCausalLM needs False: its attention has no biases ({NO_CLOSER})",
        ),
        (
            "Qwen3ForCausalLM",
            MIXED_LAYERS,
            {},
            "layer_types has 12 layers with a window and others without; Qwen3MoeForCausalLM needs one kind: it has "
            "one window for all layers",
        ),
        (
            "Qwen3ForCausalLM",
            {},
            {"shared_expert": "half"},
            "upcycle.shared_expert is half; Qwen3MoeForCausalLM needs none: it has no shared expert",
        ),
        (
            "Olmo2ForCausalLM",
            {},
            {"layers": "every-2", "shared_expert": "half"},
            "upcycle.layers is every-2; FlexOlmoForCausalLM needs all: it has experts in every layer; "
            "upcycle.shared_expert is half; FlexOlmoForCausalLM needs none: it has no shared expert",
        ),
        (
            "GraniteForCausalLM",
            {},
            {"layers": "last-half"},
            "upcycle.layers is last-half; GraniteMoeForCausalLM needs all: it has experts in every layer (the "
            "nearest target is granitemoe)",
        ),
        (
            "GraniteForCausalLM",
            {"mlp_bias": True},
            {},
            f"mlp_bias is True; GraniteMoeForCausalLM needs False: {NO_MLP_BIAS} (the nearest target is granitemoe)",
        ),
        (
            "Ernie4_5ForCausalLM",
            {"use_bias": True},
            {"layers": (0, 1, 3)},
            "use_bias is True; Ernie4_5_MoeForCausalLM needs False: no mixture-of-experts architecture of transformers "
            "has expert biases; "
            "upcycle.layers is [0, 1, 3]; Ernie4_5_MoeForCausalLM needs layers in a row, or every-N: it counts from a "
            "first layer to a last one",
        ),
        (
            "HunYuanDenseV1ForCausalLM",
            {},
            {"experts": ExpertsConfig(kind="granular", granularity=2)},
            "upcycle.shared_expert is none; HunYuanMoEV1ForCausalLM needs half or zero: it always has a shared expert; "
            "upcycle.experts.kind is granular; HunYuanMoEV1ForCausalLM needs copies: its shared expert, which is the "
            "whole FFN, is as wide as the others",
        ),
        (
            "LlamaForTokenClassification",
            {"attention_bias": True},
            {},
            f"attention_bias is True; MixtralForTokenClassification needs False: Mixtral's attention has no biases "
            f"({NO_CLOSER})",
        ),
        (
            "T5ForConditionalGeneration",
            {"feed_forward_proj": "gated-gelu"},
            SWITCH,
            "feed_forward_proj is gated-gelu; SwitchTransformersForConditionalGeneration needs one without a gate",
        ),
        (
            "T5ForConditionalGeneration",
            {"tie_word_embeddings": False},
            SWITCH,
            "tie_word_embeddings is False; SwitchTransformersForConditionalGeneration needs True: it scales what a "
            "tied head reads",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            SWITCH | {"num_experts_per_tok": 2},
            "upcycle.num_experts_per_tok is 2; SwitchTransformersForConditionalGeneration needs 1: each token visits "
            "one expert",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            SWITCH | {"num_experts_per_tok": 2, "experts": ExpertsConfig(kind="granular", granularity=2)},
            "upcycle.num_experts_per_tok is 2; SwitchTransformersForConditionalGeneration needs 1: each token visits "
            "one expert; "
            "upcycle.experts.kind is granular; SwitchTransformersForConditionalGeneration needs copies: one expert a "
            "token must be the whole FFN",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            SWITCH | {"experts": ExpertsConfig(kind="split"), "shared_expert": "half"},
            "upcycle.shared_expert is half; SwitchTransformersForConditionalGeneration needs none: it has no shared "
            "expert; "
            "upcycle.experts.kind is split; SwitchTransformersForConditionalGeneration needs copies: one expert a "
            "token must be the whole FFN",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            SWITCH | {"router": RouterConfig(kind="kmeans")},
            "upcycle.router.kind is kmeans; SwitchTransformersForConditionalGeneration needs normal: it is exact "
            "with a zero router alone",
        ),
    ],
)
def test_what_no_target_can_hold_is_refused_with_every_reason(
    architecture: str, fields: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    source = source_of(architecture, **fields)
    refusal = refusal_of(choose_conversion, source, UpcycleConfig(**settings), "here/config.json")
    assert refusal.removesuffix(BY_NAME) == f"here/config.json: {message}"


def test_a_mixture_of_ours_is_named_where_it_would_hold_what_no_native_target_does() -> None:
    llama, plain = source_of("LlamaForCausalLM", mlp_bias=True), UpcycleConfig()
    assert refusal_of(choose_conversion, llama, plain, "").endswith(BY_NAME)
    taken = choose_conversion(llama, UpcycleConfig(target="mixture"), "")
    assert taken.target.architecture == "MixtureLlamaForCausalLM"
