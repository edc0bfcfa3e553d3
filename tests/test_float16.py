"""Graphs in float16: twins within float16, and what stays float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import FLOAT16, PREFILL, STEPS, Make, assert_same_logits, draw_ids, make_exports
from onnx import TensorProto

from dense2moe.export.graph.branches import take_branches
from dense2moe.export.runtime.decoder import CUDA, Decoder, is_at_hand
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.variant import Device, Variant


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a tiny mixture of the given config, quantize it and export it."""
    return make_exports(tmp_path)


CHOOSES_ALL = {"num_experts_per_tok": 4, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
"""Every expert is chosen, so that no rounding can change which: what is left is noise.

The widths are those that CUDA's operators take.
"""
SCALES = {"MatMulNBits": 2, "QMoE": 3}  # which input they are
FLOAT16_WAYS: list[tuple[Variant, Device, str, str]] = [
    ("float16", "cpu", "fused", "moe"),
    ("float16", "cpu", "grouped", "grouped"),
    ("float16", "cpu", "unrolled", "unrolled"),
    ("float16", "cuda", "fused", "moe"),
    ("int8", "cuda", "grouped", "grouped"),
    ("int4", "cuda", "fused", "qmoe"),
    ("int4", "cuda", "grouped", "grouped"),
    ("int4", "cuda", "unrolled", "unrolled"),
    ("int4", "cuda", "switched", "switched"),
]


@pytest.mark.parametrize(("variant", "device", "lowering", "name"), FLOAT16_WAYS)
def test_a_float16_package_equals_its_twin_within_float16(
    make: Make, variant: Variant, device: Device, lowering: str, name: str
) -> None:
    export = make(variant, {"block_size": 64}, {"device": device, "lowering": lowering}, **CHOOSES_ALL)
    assert (export.facts.lowering, export.facts.element_type) == (name, "float16")
    assert_same_logits(export, FLOAT16)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 16},
        {"head_dim": 8},  # rotated by a node of its own
        {"tie_word_embeddings": False},
        {"vocab_size": 97},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize(("variant", "device"), [("float16", "cpu"), ("int4", "cuda")])
def test_shapes_of_decoders_equal_their_twin_in_float16(
    make: Make, variant: Variant, device: Device, fields: dict[str, Any]
) -> None:
    export = make(variant, {"block_size": 64, "embedding_bits": "variant"}, {"device": device}, **CHOOSES_ALL | fields)
    assert_same_logits(export, FLOAT16)


@pytest.mark.parametrize(("variant", "device", "lowering", "name"), FLOAT16_WAYS)
def test_float16_costs_little_where_experts_are_chosen(
    make: Make, variant: Variant, device: Device, lowering: str, name: str
) -> None:
    export = make(
        variant,
        {"block_size": 64},
        {"device": device, "lowering": lowering},
        **CHOOSES_ALL | {"num_experts_per_tok": 2},
    )
    ids = draw_ids(3)
    found = torch.from_numpy(export.run(ids, np.ones_like(ids), [PREFILL] + [1] * STEPS)).log_softmax(-1)
    expected = torch.from_numpy(export.expect(ids, np.ones_like(ids))).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < 5e-3  # a flip of near-equal router logits here and there: 1.5e-3 nats measured at most


@pytest.mark.parametrize(("variant", "device", "lowering", "name"), FLOAT16_WAYS)
def test_routers_norms_and_logits_stay_float32_in_a_float16_graph(
    make: Make, variant: Variant, device: Device, lowering: str, name: str
) -> None:
    export = make(variant, {"block_size": 64}, {"device": device, "lowering": lowering}, **CHOOSES_ALL)
    for branch, graph in enumerate(model.graph for model in take_branches(export.proto)):
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        norms = [node for node in graph.node if node.op_type.endswith("SimplifiedLayerNormalization")]
        assert [kinds[node.input[-1]] for node in norms] == [TensorProto.FLOAT] * 5  # two a layer, and the last
        makers = {output: node for node in graph.node for output in node.output}
        for n in range(2):
            router = makers[f"router_logits.{n}"]
            assert kinds[router.input[1]] == TensorProto.FLOAT
            flat = makers[router.input[0]]
            assert flat.op_type == "Reshape"
            assert makers[flat.input[0]] in norms  # nothing else between: what the router reads was never rounded
        chosen = [node for node in graph.node if node.op_type == "TopK" and node.output[0].endswith(".top_k")]
        assert [node.input[0] for node in chosen] == (
            []
            if lowering == "fused" or (lowering == "switched" and branch == 0)
            else ["router_logits.0", "router_logits.1"]
        )
        declared = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        caches = {kind for value, kind in declared.items() if value.startswith(("past_key_values.", "present."))}
        assert (caches, declared["logits"]) == ({TensorProto.FLOAT16}, TensorProto.FLOAT)
        products = {
            kinds[node.input[1]]
            for node in graph.node
            if node.op_type == "MatMul" and node.input[1] in kinds and "router" not in node.name
        }
        assert products <= {TensorProto.FLOAT16}
        scales = {
            node.op_type: kinds[node.input[at]]
            for node in graph.node
            for kind, at in SCALES.items()
            if node.op_type == kind
        }
        assert set(scales.values()) <= {TensorProto.FLOAT16}


def test_a_row_of_nothing_but_padding_poisons_no_other_and_is_finite_in_float16(make: Make) -> None:
    """Scores of masked slots stay finite in float16.

    Minus infinity there would make the row NaN, and NaN times a weight of zero stays NaN.
    """
    export = make("float16", None, {}, **CHOOSES_ALL)
    ids, mask = draw_ids(2, 12), np.ones((2, 12), np.int64)
    mask[1] = 0
    found = export.run(ids, mask, [12])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:1], export.run(ids[:1], mask[:1], [12]))


def test_what_cannot_be_timed_here_is_chosen_by_rank_and_said(make: Make) -> None:
    if is_at_hand(CUDA):
        pytest.skip("a CUDA device is here to time on")
    export = make("int4", {"block_size": 64}, {"device": "cuda", "lowering": "auto"}, **CHOOSES_ALL)
    assert (export.facts.lowering, export.facts.choice, export.facts.timings) == (
        "qmoe",
        "first, as no such device was there to time on",
        (),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "device", "lowering", "name"), [way for way in FLOAT16_WAYS if way[1] == "cuda"])
def test_a_file_for_cuda_equals_its_twin_on_cuda(
    make: Make, variant: Variant, device: Device, lowering: str, name: str
) -> None:
    """The very files that the tests above run on the CPU. Float16 sums on both; CUDA's are of another order."""
    if not is_at_hand(CUDA):
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    export = make(variant, {"block_size": 64}, {"device": device, "lowering": lowering}, **CHOOSES_ALL)
    assert export.facts.lowering == name
    export.decoder = Decoder(export.package, CUDA, inspection=Inspection(streams=True))
    assert_same_logits(export, FLOAT16)
