"""Facts about architectures: light to import, in the words of parts, each known to transformers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from dense2moe.export.coverage import DECODERS, classify_tensor
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import CLASS_OF_PART, Matrix, Part, TensorClass, bias_name, layer_of, matches
from dense2moe.upcycle.models.table import CONVERSIONS, DENSE_FAMILIES, TARGETS, find_family

every_architecture = pytest.mark.parametrize(
    "architecture", [*DENSE_FAMILIES, *TARGETS], ids=lambda architecture: architecture.model_type
)


def parts_of(architecture: Architecture) -> list[Mapping[Part, Matrix]]:
    return [architecture.outside, *(stack.parts for stack in architecture.stacks)]


def test_facts_need_neither_torch_nor_transformers() -> None:
    """A look at a recipe asks which targets there are, and takes a fraction of a second."""
    code = """
import sys
import dense2moe.upcycle.models.table, dense2moe.upcycle.models.routing, dense2moe.upcycle.building.config
print([name for name in ("torch", "transformers", "numpy", "onnx") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_part_has_a_class_and_every_class_a_part() -> None:
    assert set(CLASS_OF_PART) == set(get_args(Part))
    assert set(CLASS_OF_PART.values()) == set(get_args(TensorClass))
    biases = {part for part, kind in CLASS_OF_PART.items() if kind == "bias"}
    assert biases == {part for part in CLASS_OF_PART if part.endswith("_bias")} - {"selection_bias"} | {"sinks"}


SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 8,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "pad_token_id": 0,
}


@every_architecture
def test_every_tensor_that_transformers_saves_is_of_one_pattern(architecture: Architecture, tmp_path: Path) -> None:
    """One that several parts may share, as their rows; transformers joins experts when it loads, and parts them."""
    defaults = AutoConfig.for_model(architecture.model_type)
    config = AutoConfig.for_model(
        architecture.model_type, **{name: value for name, value in SMALL.items() if hasattr(defaults, name)}
    )
    if getattr(config, "layer_types", ()) is None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    getattr(transformers, architecture.architecture)(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        names = list(saved.keys())
    patterns = {matrix.name for parts in parts_of(architecture) for matrix in parts.values()}
    found = {name: [pattern for pattern in patterns if matches(pattern, name)] for name in names}
    assert {name: some for name, some in found.items() if len(some) != 1} == {}


@every_architecture
def test_parts_in_layers_have_a_layer_in_their_names_and_those_outside_have_none(architecture: Architecture) -> None:
    assert all("{" not in matrix.name for matrix in architecture.outside.values())
    for stack in architecture.stacks:
        assert all("{layer}" in matrix.name for matrix in stack.parts.values())
        experts = {part for part, matrix in stack.parts.items() if "{expert}" in matrix.name}
        assert experts in (set(), {part for part in stack.parts if part.startswith("expert_")})


@pytest.mark.parametrize("architecture", DECODERS, ids=lambda architecture: architecture.model_type)
def test_a_decoder_has_a_rotary_embedding_of_transformers(architecture: Architecture) -> None:
    name = architecture.model_type
    assert architecture.rotary is not None
    assert hasattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), architecture.rotary)


def test_a_dense_architecture_has_no_experts_and_a_sparse_one_has() -> None:
    assert all(family.experts is None and family.find("router") is None for family in DENSE_FAMILIES)
    assert all(target.experts is not None and target.find("router") is not None for target in TARGETS)
    assert all(row.experts is row.target.experts for row in CONVERSIONS)
    with pytest.raises(AssertionError, match="llama is dense"):
        find_family("llama", None, "").gate(None)


def test_a_fused_tensor_is_the_first_of_its_parts_and_has_no_gate_of_its_own() -> None:
    granite = next(target for target in TARGETS if target.model_type == "granitemoeshared")
    assert granite.find_part("model.layers.3.block_sparse_moe.input_linear.weight") == "expert_gate"
    assert granite.routed is not None
    assert granite.shared is not None
    assert granite.routed.gate is granite.shared.gate is None
    assert granite.is_stacked
    assert [target.model_type for target in TARGETS if target.shared_is_outside] == [
        "granitemoeshared",
        "granitemoe_swa",
    ]
    assert classify_tensor(granite, "model.layers.3.shared_mlp.input_linear.weight") == "experts"
    mixtral = TARGETS[0]
    assert not mixtral.is_stacked
    assert mixtral.shared is None
    assert mixtral.find_part("model.layers.3.mlp.up_proj.weight") is None


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.{layer}.b", "a.0.b", True),
        ("a.{layer}.b", "a.x.b", False),
        ("a.{layer}.b", "a.0.b.c", False),
        ("a.{layer}.e.{expert}", "a.10.e.7", True),
        ("a.b", "a.c", False),
    ],
)
def test_a_name_is_of_a_pattern_piece_by_piece(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) == expected


def test_layers_and_biases_are_read_from_names() -> None:
    assert (layer_of("model.layers.12.mlp.experts.3.up_proj.weight"), layer_of("lm_head.weight")) == (12, -1)
    assert bias_name("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.bias"
