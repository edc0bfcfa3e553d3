"""The graph of a decoder computes the logits of transformers' Mixtral, however it is fed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from exports import (
    EXACT,
    EXACT_PRODUCTS,
    FLOAT16,
    PREFILL,
    STEPS,
    VARIANTS,
    Export,
    Make,
    assert_same_logits,
    draw_ids,
    make_exports,
    pad,
)
from families import SPARSE
from onnx import TensorProto
from packaging.version import Version
from transformers import DynamicCache, Glm4MoeConfig, MixtralConfig, Qwen2Config

from dense2moe.export.coverage import ACTIVATIONS, find_decoder_family
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.lowering_plan import plan_lowerings
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.reader import open_checkpoint


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a tiny mixture of the given config, quantize it and export it."""
    return make_exports(tmp_path)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [
        (4, 1, 8),
        (4, 2, 8),
        (4, 4, 8),
        (2, 1, 16),
        (2, 2, 16),
        (4, 2, 16),
        (4, 2, 24),
        (4, 2, 20),
        (1, 1, 32),
        (4, 1, 32),
        (4, 2, 32),
        (4, 4, 32),
    ],
)
def test_every_shape_of_attention_equals_transformers(make: Make, heads: int, kv_heads: int, head_dim: int) -> None:
    export = make(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    rotations = [node for node in export.proto.graph.node if node.op_type == "RotaryEmbedding"]
    assert len(rotations) == (0 if head_dim % 16 == 0 else 4)  # queries and keys of two layers
    assert_same_logits(export)


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("pieces", [[5, 7, 3, 1, 1, 20], [1] * 37, [1, 36]])
def test_a_prompt_may_come_in_pieces(make: Make, head_dim: int, pieces: list[int]) -> None:
    export = make(head_dim=head_dim)
    ids = draw_ids(1, 37)
    assert export.error(ids, np.ones_like(ids), pieces) < EXACT


@pytest.mark.parametrize("head_dim", [8, 16])
def test_the_whole_context_is_usable(make: Make, head_dim: int) -> None:
    export = make(head_dim=head_dim)
    ids = draw_ids(2, 128)
    assert export.error(ids, np.ones_like(ids), [128]) < EXACT
    assert export.error(ids, np.ones_like(ids), [120] + [1] * 8) < EXACT


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (2, 2), (8, 2), (8, 3)])
def test_any_number_of_experts_equals_transformers(make: Make, num_experts: int, k: int) -> None:
    assert_same_logits(make(num_local_experts=num_experts, num_experts_per_tok=k))


@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_or_not_equal_transformers(make: Make, tied: bool, lowering: str) -> None:
    assert_same_logits(make(tie_word_embeddings=tied, onnx_config={"lowering": lowering}))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
def test_the_epsilon_of_every_norm_is_the_configs(make: Make, epsilon: float) -> None:
    export = make(rms_norm_eps=epsilon, initializer_range=0.05)
    assert_same_logits(export)
    norms = [node for node in export.proto.graph.node if "LayerNormalization" in node.op_type]
    assert len(norms) == 5
    assert all({a.name: a.f for a in node.attribute}["epsilon"] == np.float32(epsilon) for node in norms)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
}
SWITCH = 32


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("name", ROPES)
def test_every_static_rotary_variant_equals_transformers(make: Make, name: str, head_dim: int) -> None:
    export = make(rope_parameters=ROPES[name], head_dim=head_dim)
    assert_same_logits(export)
    ids = draw_ids(1)
    scaled = export.expect(ids, np.ones_like(ids))
    export.torch.model.rotary_emb = type(export.torch.model.rotary_emb)(MixtralConfig(head_dim=head_dim))
    plain = export.expect(ids, np.ones_like(ids))
    assert np.abs(scaled - plain).max() > 100 * EXACT * np.abs(plain).max()  # else the case would say nothing


def test_a_dynamic_rotary_embedding_is_a_plain_one_within_the_context(make: Make) -> None:
    export = make(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, head_dim=8)
    assert_same_logits(export)
    ids = draw_ids(1, 128)
    assert export.error(ids, np.ones_like(ids), [128]) < EXACT
    with pytest.raises(ExportError, match=r"^129 tokens .* 128; shorten"):
        export.decoder.new_cache(1, 129)


def make_longrope(make: Make, head_dim: int) -> Export:
    factors = {
        name: np.linspace(low, high, head_dim // 2).tolist()
        for name, low, high in (("short_factor", 1, 1.5), ("long_factor", 2, 6))
    }
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH, **factors}
    return make(rope_parameters=rope, head_dim=head_dim)


def expect_pieces(export: Export, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits of transformers fed in pieces, with its own cache."""
    cache, parts = DynamicCache(), []
    for n, end in zip(pieces, np.cumsum(pieces), strict=True):
        mask_BT = torch.from_numpy(mask[:, :end])
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -n:]
        with torch.inference_mode():
            fed = {
                "input_ids": torch.from_numpy(ids[:, end - n : end]),
                "attention_mask": mask_BT,
                "position_ids": positions,
            }
            parts.append(export.torch(**fed, past_key_values=cache).logits.numpy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_a_longrope_switches_its_factors_where_transformers_does(make: Make, head_dim: int) -> None:
    export = make_longrope(make, head_dim)
    for length in (SWITCH - 1, SWITCH, SWITCH + 1, PREFILL + STEPS):
        ids = draw_ids(1, length)
        assert export.error(ids, np.ones_like(ids), [length]) < EXACT, length
    for batch, padding in ((1, "none"), (3, "left"), (3, "right")):
        ids, mask, pieces = draw_ids(batch), pad(batch, padding), [PREFILL] + [1] * STEPS
        found, expected = export.run(ids, mask, pieces), expect_pieces(export, ids, mask, pieces)
        real = mask.astype(bool)
        assert np.abs(found - expected)[real].max() < EXACT * np.abs(expected[real]).max(), (batch, padding)
        at_once = export.expect(ids, mask)  # another function: all keys by the long factors
        assert np.abs(at_once - expected)[real].max() > 100 * EXACT * np.abs(expected[real]).max()
    # nothing switches on the way
    assert export.error(ids[:1], np.ones_like(ids[:1]), [SWITCH + 8] + [1] * (PREFILL + STEPS - SWITCH - 8)) < EXACT


@pytest.mark.parametrize(
    ("variant", "lowering", "embedding_bits"),
    [
        ("int8", "grouped", 8),
        ("int8", "unrolled", 16),
        ("int4", "grouped", 16),
        ("int4", "grouped", "variant"),
        ("int4", "unrolled", 8),
    ],
)
def test_quantized_packages_equal_their_twin(make: Make, variant: Variant, lowering: str, embedding_bits: Any) -> None:
    export = make(variant, {"embedding_bits": embedding_bits}, {"lowering": lowering})
    assert_same_logits(export)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_widths_that_no_block_divides_equal_their_twin(
    make: Make, variant: Variant, block_size: int, tied: bool
) -> None:
    export = make(
        variant,
        {"embedding_bits": "variant", "block_size": block_size},
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=172,
        tie_word_embeddings=tied,
    )
    assert_same_logits(export)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_an_embedding_that_blocks_divide_is_gathered_in_integers(make: Make, variant: Variant, block_size: int) -> None:
    export = make(variant, {"embedding_bits": "variant", "block_size": block_size})
    assert [node.op_type for node in export.proto.graph.node if "embedded" in node.output] == ["GatherBlockQuantized"]
    assert_same_logits(export)


@pytest.mark.parametrize(
    ("width", "block_size", "lowering", "tied"),
    [
        (32, 16, "fused", True),
        (48, 16, "fused", False),
        (64, 32, "fused", True),
        (48, 16, "grouped", True),
        (40, 32, "grouped", False),
        (40, 32, "grouped", True),
        (32, 16, "unrolled", False),
        (40, 32, "unrolled", True),
    ],
)
def test_packages_with_zero_points_equal_their_twin(
    make: Make, width: int, block_size: int, lowering: str, tied: bool
) -> None:
    """Embeddings of an even number of blocks, of an odd one, and of a width that no block divides.

    Q, k and v, and gate and up, in one product.
    """
    quantize = {"embedding_bits": "variant", "attention_bits": "variant", "block_size": block_size, "zero_points": True}
    fields = {"hidden_size": width, "head_dim": 8, "intermediate_size": 80, "tie_word_embeddings": tied}
    export = make("int4", quantize, {"lowering": lowering}, **fields)
    proto = export.proto
    products = [node for node in proto.graph.node if node.op_type in ("MatMulNBits", "QMoE")]
    assert len(products) == {"fused": 7, "grouped": 5 + 2 * 8, "unrolled": 5 + 2 * 8}[lowering]
    assert all(
        sum(name.endswith(".zero_points") for name in node.input) == (2 if node.op_type == "QMoE" else 1)
        for node in products
    )
    (table,) = (node for node in proto.graph.node if "embedded" in node.output)
    assert table.op_type == ("GatherBlockQuantized" if width in (32, 64) else "Slice")
    assert_same_logits(export)


def test_zero_points_of_8_bits_equal_their_twin(make: Make) -> None:
    export = make(
        "int8", {"embedding_bits": "variant", "block_size": 16, "zero_points": True}, hidden_size=48, head_dim=8
    )
    assert [len(node.input) for node in export.proto.graph.node if node.op_type == "GatherBlockQuantized"] == [4]
    assert_same_logits(export)


@pytest.mark.parametrize("attention_bits", ["variant", 8, 16])
def test_attention_may_have_bits_of_its_own(make: Make, attention_bits: Any) -> None:
    export = make("int4", {"attention_bits": attention_bits})
    kinds = {node.op_type for node in export.proto.graph.node if "layers.0.query_key_value" in node.output}
    assert kinds == {"MatMul" if attention_bits == 16 else "MatMulNBits"}
    assert_same_logits(export)


@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled", "switched"])
@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_8_bit_activations_cost_little(make: Make, variant: Variant, lowering: str) -> None:
    export = make(variant, None, {"lowering": lowering, "activation_bits": 8})
    assert export.facts.lowering == ("qmoe" if lowering == "fused" else lowering)
    ids = draw_ids(3)
    found = torch.from_numpy(export.run(ids, np.ones_like(ids), [PREFILL] + [1] * STEPS)).log_softmax(-1)
    expected = torch.from_numpy(export.expect(ids, np.ones_like(ids))).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    # 1/254 of the largest activation at each of some twenty products, and the routers' flips: 8e-3 nats measured.
    assert 0 < kl < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_are_router_logits_and_residual_streams(make: Make, variant: Variant) -> None:
    export = make(variant)
    assert export.decoder.taps == ["hidden.0", "hidden.1", "router_logits.0", "router_logits.1"]
    ids = draw_ids(2, 30)
    caught: dict[str, torch.Tensor] = {}
    for n, layer in enumerate(export.torch.model.layers):
        layer.register_forward_hook(lambda _module, _inputs, output, n=n: caught.update({f"hidden.{n}": output}))
        layer.post_attention_layernorm.register_forward_hook(
            lambda _module, _inputs, output, n=n, layer=layer: caught.update(
                {f"router_logits.{n}": (output @ layer.mlp.gate.weight.T).flatten(0, 1)}
            )
        )
    export.expect(ids, np.ones_like(ids))
    found = export.decoder.run(export.decoder.new_cache(2, 30), ids)
    for name, expected in caught.items():
        limit = (FLOAT16 if variant == "float16" else EXACT) * float(expected.abs().max())
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=0, atol=limit, err_msg=name)
    assert len(caught) == 4


@pytest.mark.parametrize(("lowering", "activation_bits"), [("grouped", 8), ("grouped", 32), ("unrolled", 8)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_routers_stay_float_and_experts_do_not(
    make: Make, variant: Variant, lowering: str, activation_bits: int
) -> None:
    export = make(variant, None, {"lowering": lowering, "activation_bits": activation_bits})
    graph = export.proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for n in range(2):
        (node,) = [node for node in graph.node if f"router_logits.{n}" in node.output]
        assert node.op_type == "MatMul"
        router = tensors[node.input[1]]
        assert router.data_type == TensorProto.FLOAT
        expected = Twin(export.twin).checkpoint.read(f"model.layers.{n}.block_sparse_moe.gate.weight").T
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(router), expected)
    experts = {name: tensor.data_type for name, tensor in tensors.items() if ".moe." in name}
    assert len(experts) >= 4
    stored = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    if variant in stored:
        assert set(experts.values()) == {stored[variant]}
    else:
        assert {name.rsplit(".", 1)[1]: kind for name, kind in experts.items()} == {
            "codes": TensorProto.UINT8,
            "scales": TensorProto.BFLOAT16,
        }


@pytest.mark.parametrize(("width", "lowering"), [(32, "grouped"), (40, "unrolled")])
@pytest.mark.parametrize(("variant", "zero_points"), [*((variant, False) for variant in VARIANTS), ("int4", True)])
def test_the_model_is_well_formed(make: Make, variant: Variant, zero_points: bool, lowering: str, width: int) -> None:
    quantize = {"embedding_bits": "variant", "zero_points": zero_points}
    export = make(variant, quantize, {"lowering": lowering}, hidden_size=width, head_dim=8)
    proto = export.proto
    read = {name for node in proto.graph.node for name in node.input if name}
    initializers = [tensor.name for tensor in proto.graph.initializer]
    assert len(set(initializers)) == len(initializers)
    assert set(initializers) <= read
    produced = [name for node in proto.graph.node for name in node.output if name]
    assert len(set(produced)) == len(produced)
    assert {value.name for value in proto.graph.input} <= read
    unread = set(produced) - read - {value.name for value in proto.graph.output}
    # Second halves of pairs, what was sorted for its order alone, and the last residual.
    assert {name.rsplit(".", 1)[-1] for name in unread} <= {"slot", "sorted_experts", "sorted_order", "1"}
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert (proto.ir_version, {o.domain: o.version for o in proto.opset_import}) == (10, {"": 21, "com.microsoft": 1})
    for node in proto.graph.node:
        # onnxruntime registers it in the standard domain; the standard does not know it
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.checker.check_model(proto, full_check=True)


@pytest.mark.parametrize(
    ("variant", "fields", "config", "names"),
    [
        ("float32", {}, {"lowering": "fused"}, ["moe"]),
        ("float32", {}, {"lowering": "unrolled"}, ["unrolled"]),
        ("float32", {}, {"lowering": "auto"}, ["moe", "grouped", "unrolled"]),
        ("int8", {}, {"lowering": "auto"}, ["grouped", "unrolled"]),
        ("int8", {}, {"lowering": "auto", "activation_bits": 8}, ["qmoe", "grouped", "unrolled"]),
        ("int4", {}, {"lowering": "fused"}, ["qmoe"]),
        ("float16", {}, {"lowering": "auto"}, ["moe", "grouped", "unrolled"]),
        ("int4", {"hidden_size": 40, "head_dim": 8}, {"lowering": "auto"}, ["grouped", "unrolled"]),
    ],
)
def test_the_planned_lowerings_are_timed_and_one_is_built(
    make: Make, variant: Variant, fields: dict[str, Any], config: dict[str, Any], names: list[str]
) -> None:
    export = make(variant, None, config, **fields)
    checkpoint = open_checkpoint(export.twin)
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    if "qmoe" in names and Version(ort.__version__) < Version("1.31"):
        names = names[1:]  # its block is as wide as the hidden size, which older ones refuse
    assert (
        list(
            plan_lowerings(
                checkpoint.config,
                shapes,
                variant,
                QuantizeConfig(method="search"),
                OnnxConfig(**EXACT_PRODUCTS | config),
            )
        )
        == names
    )
    assert sorted(time.lowering for time in export.facts.timings) == (sorted(names) if len(names) > 1 else [])
    assert export.facts.lowering == (export.facts.timings[0].lowering if len(names) > 1 else names[0])
    assert export.facts.num_nodes == len(export.proto.graph.node)


def test_zero_points_for_cuda_are_planned_without_its_operator_and_refused_with_it(make: Make) -> None:
    checkpoint = open_checkpoint(make().twin)
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    quantize = QuantizeConfig(zero_points=True, block_size=64)
    wide = {name: tuple(64 if n == 32 else n for n in shape) for name, shape in shapes.items()}
    assert plan_lowerings(checkpoint.config, wide, "int4", quantize, OnnxConfig(device="cuda")) == (
        "grouped",
        "unrolled",
    )
    message = (
        "export.lowering 'fused' cannot express layers.0.moe (qmoe: CUDA's QMoE operator has no zero points); "
        "use 'auto'"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        plan_lowerings(checkpoint.config, wide, "int4", quantize, OnnxConfig(device="cuda", lowering="fused"))


def test_a_lowering_that_cannot_be_is_refused_when_planned(make: Make) -> None:
    checkpoint = open_checkpoint(make().twin)
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    message = (
        "export.lowering 'fused' cannot express layers.0.moe "
        "(qmoe: the hidden size 32 is not a multiple of the block size 64); use 'auto'"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        plan_lowerings(
            checkpoint.config,
            shapes,
            "int4",
            QuantizeConfig(method="search", block_size=64),
            OnnxConfig(lowering="fused"),
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen2Config(),
            "config.json: model_type qwen2 has no ONNX builder yet; "
            f"supported: {', '.join(name for name, target in SPARSE.items() if target.built)}, llama",
        ),
        (
            MixtralConfig(is_causal=False),
            "config.json: is_causal is False; graphs are written of decoders that read from left to right alone",
        ),
        (
            MixtralConfig(architectures=["MixtralForTokenClassification"]),
            "config.json: architectures is MixtralForTokenClassification; graphs are written of decoders with logits "
            "of the next token alone",
        ),
        (Glm4MoeConfig(), "config.json: partial_rotary_factor is 0.5; the builder rotates whole heads"),
        (
            Glm4MoeConfig(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}, n_group=2
            ),
            "config.json: n_group is 2; the builder chooses among all experts at once",
        ),
        (
            MixtralConfig(hidden_act="mish"),
            f"config.json: hidden_act is mish; the builder covers {', '.join(ACTIVATIONS)}",
        ),
        (
            MixtralConfig(rope_parameters={"rope_type": "proportional", "rope_theta": 10000.0}),
            "config.json: rope_type is proportional; the builder covers default, linear, llama3, yarn, dynamic, "
            "longrope",
        ),
    ],
)
def test_models_that_are_not_covered_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        find_decoder_family(config)


def test_a_window_of_the_whole_context_is_full_attention(make: Make) -> None:
    assert_same_logits(make(sliding_window=128))
