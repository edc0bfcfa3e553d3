"""Every config field has a fate, every family and target its place in the tables."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
from families import FAMILIES, SPARSE
from plans import every_conversion, refusal_of, source_of
from transformers import CONFIG_MAPPING, PreTrainedConfig

from dense2moe.upcycle.building.config import BIASED_TARGETS, TargetName
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.refused import REFUSED
from dense2moe.upcycle.models.table import (
    COMMON_NEUTRAL,
    CONVERSIONS,
    DENSE_FAMILIES,
    GENERIC_FIELDS,
    HOSTS,
    TARGETS,
    find_family,
)

# What no conversion decides, by the kind of model, with the reason why it need not.
UNDECIDED = {
    "text-generation": {
        "output_router_logits": "what is returned beside the logits",
        "router_aux_loss_coef": "a loss",
        "rope_theta": "`rope_parameters` says it",
        "rope_scaling": "`rope_parameters` says it",
        "sep_token_id": "no forward pass reads it",
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


def derived_names(row: Conversion) -> set[str]:
    return set(row.derived(source_of(row.family.architecture)))


def structural_names(row: Conversion) -> list[str]:
    """Fields that the settings decide: experts, their width, and which layers have them."""
    experts = row.experts
    names = [experts.count_field, experts.width_field]
    names += [experts.top_k_field] if experts.top_k_field else []
    names += [experts.shared.width_field] if experts.shared and experts.shared.width_field else []
    width = experts.dense_width_field
    return (
        names
        + {
            "none": [],
            "list": ["mlp_only_layers", width],
            "types": ["mlp_layer_types", width],
            "interval": ["moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", width],
            "step": ["num_sparse_encoder_layers", "num_sparse_decoder_layers"],
            "last": [experts.num_dense_field, width],
        }[experts.partial_layers]
    )


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
    for name in set(names) - declared(row.target.model_type) - set(GENERIC_FIELDS):
        assert f'getattr(config, "{name}"' in modeling or f"config.{name}" in modeling


@every_conversion
def test_every_field_of_the_target_is_decided(row: Conversion) -> None:
    decided = {*row.carried, *row.experts.fixed, *derived_names(row), *structural_names(row), *COMMON_NEUTRAL}
    assert declared(row.target.model_type) - decided == set(UNDECIDED[row.target.task]) & declared(
        row.target.model_type
    )


@every_conversion
def test_families_and_targets_are_those_of_transformers(row: Conversion) -> None:
    for side in (row.family, row.target):
        assert getattr(transformers, side.architecture).config_class is CONFIG_MAPPING[side.model_type]


def test_the_targets_that_a_recipe_can_ask_for_are_those_of_the_table() -> None:
    assert set(get_args(TargetName)) == {"auto", *(row.target.model_type for row in CONVERSIONS), "mixture"}
    assert set(BIASED_TARGETS) == {name for name, target in SPARSE.items() if target.biased}


def test_each_pair_stands_once_and_every_family_has_one() -> None:
    pairs = [(row.family.model_type, row.target.model_type) for row in CONVERSIONS]
    assert len(pairs) == len(set(pairs))
    assert {row.target.model_type for row in CONVERSIONS} == {target.model_type for target in TARGETS}
    assert {row.family.model_type for row in CONVERSIONS} == {family.model_type for family in DENSE_FAMILIES}


def plain(name: str) -> str:
    """A name without case and punctuation: "Ernie4.5-MoE" and "ernie4_5_moe" are one."""
    return re.sub("[^a-z0-9]", "", name.lower())


def test_the_page_says_what_becomes_what_and_how_exactly() -> None:
    page = (Path(__file__).parent.parent / "docs" / "upcycling.md").read_text(encoding="utf-8")
    table = page.partition("## What becomes what\n")[2].partition("\n\n-")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("|")]
    rows = [(plain(line[0]), [plain(name) for name in re.split("[;,]", line[1])], line[2]) for line in lines]
    for row in CONVERSIONS:
        family, target = plain(row.family.model_type), plain(row.target.model_type)
        exact = {exact for families, targets, exact in rows if family in families and target in targets}
        assert exact, f"{row.family.model_type} -> {row.target.model_type} is not in docs/upcycling.md"
        assert {each == "bitwise" for each in exact} == {row.zero_router == "bitwise"}
    named = {target for _, targets, _ in rows for target in targets}
    assert {plain(target.model_type) for target in TARGETS} <= named


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


def test_another_head_of_a_known_family_is_told() -> None:
    message = refusal_of(find_family, "llama", ["LlamaForNothing"], "here/config.json")
    assert message.startswith("here/config.json: architectures is LlamaForNothing; it must be LlamaModel, ")


@pytest.mark.parametrize(
    "architectures", [1, True, "LlamaForCausalLM", {"0": "LlamaForCausalLM"}, [1], ["LlamaForCausalLM", None]]
)
def test_architectures_that_are_no_list_of_names_are_refused(architectures: Any) -> None:
    assert refusal_of(find_family, "llama", architectures, "here/config.json") == (
        f"here/config.json: architectures is {architectures!r}; it must be a list of class names, such as "
        "['LlamaForCausalLM']"
    )


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("qwen3_next", "is a mixture of experts already; give a dense model"),
        ("gpt_oss", "is a mixture of experts already; give a dense model"),
        ("gemma3", "is made of several models; save the one"),
        ("mixtral", "is a mixture of experts already; give a dense model"),
        ("mamba2", "cannot be upcycled: no table says where its FFNs are; docs/upcycling.md lists"),
    ],
)
def test_a_family_that_no_table_names_is_told_what_is_known(model_type: str, what: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    assert refusal_of(find_family, model_type, None, "config.json", config).startswith(
        f"config.json: {model_type} {what}"
    )


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_are_refused_are_those_of_transformers_and_of_no_table(model_type: str) -> None:
    assert model_type in CONFIG_MAPPING
    assert model_type not in {family.model_type for family in (*DENSE_FAMILIES, *HOSTS)}
    assert refusal_of(find_family, model_type, ["AClass"], "here/config.json") == (
        f"here/config.json: AClass ({model_type}) has {REFUSED[model_type]}, so that no experts can take its place; "
        "give a model of another family"
    )
