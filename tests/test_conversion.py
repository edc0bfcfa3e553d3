"""Every config field has a fate, every dense model the first target that holds it.

And what none can hold is refused in words.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import transformers
from families import FAMILIES, SPARSE
from transformers import CONFIG_MAPPING, PreTrainedConfig

from dense2moe.upcycle.building.choice import choose_conversion
from dense2moe.upcycle.building.config import BIASED_TARGETS, ExpertsConfig, RouterConfig, TargetName, UpcycleConfig
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.no_twin import NO_TWIN
from dense2moe.upcycle.models.table import COMMON_NEUTRAL, CONVERSIONS, DENSE_FAMILIES, TARGETS, find_family

every_conversion = pytest.mark.parametrize(
    "row", CONVERSIONS, ids=lambda row: f"{row.family.model_type}->{row.target.model_type}"
)

# What no conversion decides, by the kind of model, with the reason why it need not.
UNDECIDED = {
    "text-generation": {
        "output_router_logits": "what is returned beside the logits",
        "router_aux_loss_coef": "a loss",
    },
    "text2text-generation": {
        "add_router_probs": "what is returned beside the logits",
        "router_aux_loss_coef": "a loss",
        "router_z_loss_coef": "a loss",
        "bos_token_id": "T5 has none, and no forward pass of its target reads it",
        "is_decoder": "each of the two stacks sets its own",
    },
}


def declared(model_type: str) -> set[str]:
    """Fields of a config class, by the names under which it stores them."""
    config_class = CONFIG_MAPPING[model_type]
    return {config_class.attribute_map.get(field.name, field.name) for field in dataclasses.fields(config_class)}


def source_of(architecture: str, **fields: Any) -> PreTrainedConfig:
    return getattr(transformers, architecture).config_class(architectures=[architecture], **fields)


def derived_names(row: Conversion) -> set[str]:
    return set(row.derived(source_of(row.family.architecture)))


def structural_names(row: Conversion) -> list[str]:
    """Fields that the settings decide: experts, their width, and which layers have them."""
    experts = row.experts
    names = [experts.count_field, experts.width_field]
    names += [experts.top_k_field] if experts.top_k_field else []
    names += [experts.shared.width_field] if experts.shared else []
    return (
        names
        + {
            "none": [],
            "list": ["mlp_only_layers", "intermediate_size"],
            "step": ["num_sparse_encoder_layers", "num_sparse_decoder_layers"],
            "last": ["first_k_dense_replace", "intermediate_size"],
        }[row.experts.partial_layers]
    )


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        call(*arguments)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


# The tables


@every_conversion
def test_every_config_field_of_the_source_is_classified_once(row: Conversion) -> None:
    classes = (row.carried, row.required, row.consumed, row.optional, row.neutral, COMMON_NEUTRAL)
    classified = [name for names in classes for name in names]
    assert declared(row.family.model_type) <= set(classified), (
        "a new transformers has new fields: classify them in the family's file in upcycle/models"
    )
    assert len(classified) == len(set(classified))
    assert set(classified) - COMMON_NEUTRAL - declared(row.family.model_type) == set(row.optional)


@every_conversion
def test_no_field_of_a_familys_own_passes_as_neutral_for_all(row: Conversion) -> None:
    of_all = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert COMMON_NEUTRAL & (declared(row.family.model_type) - of_all) == set()


@every_conversion
def test_every_field_that_is_set_is_one_that_the_target_reads_and_is_set_by_one_rule(row: Conversion) -> None:
    names = [*row.carried, *row.optional, *row.experts.fixed, *derived_names(row), *structural_names(row)]
    assert len(names) == len(set(names))
    modeling = inspect.getsource(sys.modules[getattr(transformers, row.target.architecture).__module__])
    for name in set(names) - declared(row.target.model_type):
        assert f'getattr(config, "{name}"' in modeling or f"config.{name}" in modeling


@every_conversion
def test_every_field_of_the_target_is_decided(row: Conversion) -> None:
    decided = {*row.carried, *row.experts.fixed, *derived_names(row), *structural_names(row), *COMMON_NEUTRAL}
    assert declared(row.target.model_type) - decided == set(UNDECIDED[row.family.task]) & declared(
        row.target.model_type
    )


@every_conversion
def test_families_and_targets_are_those_of_transformers(row: Conversion) -> None:
    for side in (row.family, row.target):
        assert getattr(transformers, side.architecture).config_class is CONFIG_MAPPING[side.model_type]


def test_the_targets_that_a_recipe_can_ask_for_are_those_of_the_table() -> None:
    assert set(get_args(TargetName)) == {"auto", *(row.target.model_type for row in CONVERSIONS), "mixture"}
    assert set(BIASED_TARGETS) == {target.model_type for target in TARGETS if target.find("selection_bias")}


def test_each_pair_stands_once_and_every_family_has_one() -> None:
    pairs = [(row.family.model_type, row.target.model_type) for row in CONVERSIONS]
    assert len(pairs) == len(set(pairs))
    assert {row.target.model_type for row in CONVERSIONS} == {target.model_type for target in TARGETS}
    assert {row.family.model_type for row in CONVERSIONS} == {family.model_type for family in DENSE_FAMILIES}


def test_every_conversion_stands_in_the_table_of_the_tests() -> None:
    assert set(SPARSE) == {target.model_type for target in TARGETS}
    assert {(row.family.model_type, row.family.architecture, row.target.model_type) for row in CONVERSIONS} == {
        (name, family.architecture, target) for name, family in FAMILIES.items() for target in family.targets
    }


# Families


@pytest.mark.parametrize("family", DENSE_FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_found_by_type_and_architecture(family: Any) -> None:
    assert (
        find_family(family.model_type, [family.architecture], "") is find_family(family.model_type, None, "") is family
    )


@pytest.mark.parametrize(
    ("model_type", "architectures", "named"),
    [
        ("mixtral", ["MixtralForCausalLM"], "MixtralForCausalLM (mixtral)"),
        ("mamba", None, "mamba"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(
    model_type: str, architectures: list[str] | None, named: str
) -> None:
    assert refusal(find_family, model_type, architectures, "here/config.json") == (
        f"here/config.json: {named} cannot be upcycled: no table says what its tensors and config values mean; "
        f"supported: {', '.join(family.architecture for family in FAMILIES.values())}"
    )


@pytest.mark.parametrize(
    ("model_type", "found", "needed"),
    [
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("t5", "T5EncoderModel", "T5ForConditionalGeneration"),
    ],
)
def test_another_head_of_a_known_family_is_told(model_type: str, found: str, needed: str) -> None:
    assert refusal(find_family, model_type, [found], "here/config.json") == (
        f"here/config.json: {found} ({model_type}) has another head than {needed}; give the model with the head that "
        "the family was trained with"
    )


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("qwen3_next", "is a mixture of experts already"),
        ("gpt_oss", "is a mixture of experts already"),
        ("deepseek_v3", "is a mixture of experts already"),
        ("minicpm3", "has latent attention"),
        ("vaultgemma", "has soft caps on attention scores or logits"),
        ("mamba2", "has layers of a state space, a recurrence or a convolution"),
        ("recurrent_gemma", "has layers of a state space, a recurrence or a convolution"),
        ("falcon_h1", "has layers of a state space, a recurrence or a convolution"),
        ("lfm2", "has layers of a state space, a recurrence or a convolution"),
        ("gemma3", "has parts that read images or sound beside the text model"),
        ("marian", "has an encoder"),
        ("codegen", "has LayerNorm"),
    ],
)
def test_a_family_that_no_table_names_is_told_by_what_its_config_has(model_type: str, missing: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    assert refusal(find_family, model_type, None, "config.json", config).startswith(
        f"config.json: {model_type} {missing}"
    )


@pytest.mark.parametrize(
    ("model_type", "architectures", "message"),
    [
        (
            "gemma2",
            ["Gemma2ForCausalLM"],
            "config.json: Gemma2ForCausalLM (gemma2) has soft caps on attention scores and logits, and norms on both "
            "sides of the FFN; "
            "no mixture-of-experts architecture of transformers holds that; the nearest target is mixtral",
        ),
        (
            "gemma3_text",
            ["Gemma3ForCausalLM"],
            "config.json: Gemma3ForCausalLM (gemma3_text) has norms on both sides of the FFN, and another rotary "
            "base in every sixth layer; "
            "no mixture-of-experts architecture of transformers holds that; the nearest target is qwen3_moe",
        ),
        (
            "gpt_neox",
            ["GPTNeoXForCausalLM"],
            "config.json: GPTNeoXForCausalLM (gpt_neox) has attention and FFN in parallel, LayerNorm, and an FFN "
            "with biases and without a gate; "
            "no mixture-of-experts architecture of transformers holds that",
        ),
        (
            "cohere",
            None,
            "config.json: cohere has attention and FFN in parallel, LayerNorm, and scaled logits; "
            "no mixture-of-experts architecture of transformers holds that; the nearest target is granitemoe",
        ),
        (
            "mt5",
            ["MT5ForConditionalGeneration"],
            "config.json: MT5ForConditionalGeneration (mt5) has a gated FFN, where the only encoder-decoder target "
            "has none; "
            "no mixture-of-experts architecture of transformers holds that; the nearest target is switch_transformers",
        ),
    ],
)
def test_a_family_without_a_twin_is_refused_with_the_reason(
    model_type: str, architectures: list[str] | None, message: str
) -> None:
    assert refusal(find_family, model_type, architectures, "here/config.json") == f"here/{message}"


@pytest.mark.parametrize(
    "architectures", [1, True, "LlamaForCausalLM", {"0": "LlamaForCausalLM"}, [1], ["LlamaForCausalLM", None]]
)
def test_architectures_that_are_no_list_of_names_are_refused(architectures: Any) -> None:
    assert refusal(find_family, "llama", architectures, "here/config.json") == (
        f"here/config.json: architectures is {architectures!r}; it must be a list of class names, such as "
        "['LlamaForCausalLM']"
    )


@pytest.mark.parametrize("model_type", NO_TWIN)
def test_families_without_a_twin_are_known_to_transformers_and_to_no_conversion(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING
    assert model_type not in {family.model_type for family in DENSE_FAMILIES}
    assert NO_TWIN[model_type].nearest in {None, *(row.target.model_type for row in CONVERSIONS)}
    assert refusal(find_family, model_type, None, "config.json").startswith(
        f"config.json: {model_type} has {NO_TWIN[model_type].reason}; "
    )


# The choice

MIXED_LAYERS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 20}
T5_SETTINGS: dict[str, Any] = {"num_experts_per_tok": 1}


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
    config = UpcycleConfig(target=row.target.model_type, **(T5_SETTINGS if row.experts.top_1 else {}))  # type: ignore[arg-type]
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
        assert "Qwen3MoeForCausalLM needs none" in refusal(
            choose_conversion, source_of(architecture), config, "config.json"
        )
    else:
        assert choose_conversion(source_of(architecture), config, "config.json").target.model_type != "glm4_moe"


# Refusals

NO_MLP_BIAS = "no mixture-of-experts architecture of transformers has expert biases with this FFN"
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
            "granitemoeshared, glm4_moe",
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
            "upcycle.target is mixtral; Olmo2ForCausalLM can become flex_olmo",
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
            "T5ForConditionalGeneration",
            {"feed_forward_proj": "gated-gelu"},
            T5_SETTINGS,
            "feed_forward_proj is gated-gelu; SwitchTransformersForConditionalGeneration needs one without a gate",
        ),
        (
            "T5ForConditionalGeneration",
            {"tie_word_embeddings": False},
            T5_SETTINGS,
            "tie_word_embeddings is False; SwitchTransformersForConditionalGeneration needs True: it scales what a "
            "tied head reads",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            {},
            "upcycle.num_experts_per_tok is 2; SwitchTransformersForConditionalGeneration needs 1: each token visits "
            "one expert",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            {"experts": ExpertsConfig(kind="granular", granularity=2)},
            "upcycle.num_experts_per_tok is 2; SwitchTransformersForConditionalGeneration needs 1: each token visits "
            "one expert; "
            "upcycle.experts.kind is granular; SwitchTransformersForConditionalGeneration needs copies: one expert a "
            "token must be the whole FFN",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            T5_SETTINGS | {"experts": ExpertsConfig(kind="split"), "shared_expert": "half"},
            "upcycle.shared_expert is half; SwitchTransformersForConditionalGeneration needs none: it has no shared "
            "expert; "
            "upcycle.experts.kind is split; SwitchTransformersForConditionalGeneration needs copies: one expert a "
            "token must be the whole FFN",
        ),
        (
            "T5ForConditionalGeneration",
            {},
            T5_SETTINGS | {"router": RouterConfig(kind="kmeans")},
            "upcycle.router.kind is kmeans; SwitchTransformersForConditionalGeneration needs normal: it is exact "
            "with a zero router alone",
        ),
    ],
)
def test_what_no_target_can_hold_is_refused_with_every_reason(
    architecture: str, fields: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    source = source_of(architecture, **fields)
    assert (
        refusal(choose_conversion, source, UpcycleConfig(**settings), "here/config.json")
        == f"here/config.json: {message}"
    )
