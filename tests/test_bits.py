"""Classes of tensors, and the bits of each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dense2moe.export.coverage import DECODERS, classify_tensor
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.bits import class_bits
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.variant import Device, Variant


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.11.input_layernorm.weight", "norm"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.k_proj.weight", "attention"),
        ("model.layers.0.self_attn.v_proj.weight", "attention"),
        ("model.layers.0.self_attn.o_proj.weight", "attention"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.10.w1.weight", "experts"),
        ("model.layers.0.block_sparse_moe.experts.0.w2.weight", "experts"),
        ("model.layers.0.block_sparse_moe.experts.0.w3.weight", "experts"),
    ],
)
def test_every_tensor_has_one_class(name: str, kind: str) -> None:
    assert classify_tensor(DECODERS[0], name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.norm",
        "model.layers.x.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.w1.weight",
        "x.lm_head.weight",
    ],
)
def test_names_that_only_look_alike_have_none(name: str) -> None:
    message = f"tensor '{name}' is not known to the mixtral family; it can be neither quantized nor exported"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        classify_tensor(DECODERS[0], name)


@pytest.mark.parametrize(
    ("variant", "device", "attention", "embedding", "expected", "floats"),
    [
        ("float32", "cpu", "variant", "variant", (32, 32, 32), 32),
        ("float32", "cpu", 8, 8, (32, 32, 32), 32),
        ("int8", "cpu", "variant", "variant", (8, 8, 8), 32),
        ("int8", "cpu", 8, 16, (8, 8, 32), 32),
        ("int8", "cpu", 16, 8, (8, 32, 8), 32),
        ("int4", "cpu", "variant", "variant", (4, 4, 4), 32),
        ("int4", "cpu", "variant", 8, (4, 4, 8), 32),
        ("int4", "cpu", 8, 16, (4, 8, 32), 32),
        ("int4", "cpu", 16, "variant", (4, 32, 4), 32),
        ("float32", "cuda", 8, 8, (32, 32, 32), 32),
        ("float16", "cpu", 8, 8, (16, 16, 16), 16),
        ("float16", "cuda", "variant", 8, (16, 16, 16), 16),
        ("int8", "cuda", 8, 16, (8, 8, 16), 16),
        ("int4", "cuda", 16, "variant", (4, 16, 4), 16),
    ],
)
def test_bits_of_every_class(
    variant: Variant, device: Device, attention: Any, embedding: Any, expected: tuple[int, int, int], floats: int
) -> None:
    bits = class_bits(variant, QuantizeConfig(attention_bits=attention, embedding_bits=embedding), device)
    experts, attention_bits, table = expected
    assert bits == {
        "experts": experts,
        "attention": attention_bits,
        "embedding": table,
        "head": table,
        "router": 32,
        "norm": 32,
        "bias": floats,
    }
