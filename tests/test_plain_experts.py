"""Experts without a gate, with biases and with other activations, by every way that can write them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from expert_layers import (
    GATED,
    WAYS,
    Inside,
    assert_close,
    build,
    compute,
    draw,
    load,
    loaded,
    make_layer,
    routed,
    run,
    softmax,
)
from packaging.version import Version
from shapes import each_shape
from transformers.activations import ACT2FN

from dense2moe.export.coverage import ACTIVATIONS
from dense2moe.export.errors import ExportError
from dense2moe.export.lowering import GROUPED, MOE, QMOE, SWITCHED, UNROLLED, find_lowerings
from dense2moe.export.nodes.activation import add_inner
from dense2moe.export.nodes.linear import Linear, add_linear
from dense2moe.export.nodes.writer import IR_VERSION, OPSETS, GraphWriter, graph_input
from dense2moe.export.quantization.blockwise import Quantized
from dense2moe.export.quantization.twin import Bias, QuantizedWeight
from dense2moe.upcycle.checkpoints.tensors import TensorEntry

PLAIN = Inside("gelu_new", gated=False, biased=True)
"""GPT-2's, which every way can write."""
FUSED = (
    PLAIN,
    Inside("relu", gated=False, biased=True),
    Inside("silu", gated=False),
    Inside("silu", biased=True),
    Inside("quick_gelu", biased=True),
)
"""What the operators know."""
OTHERS = (Inside("gelu", gated=False, biased=True), Inside("relu2", gated=False), Inside("gelu"), Inside("relu"))
"""What they do not."""
CASES = [(name, PLAIN) for name in WAYS]
DIFFERENT = {
    *("moe", "moe_float16", "qmoe_4", "qmoe_4_rounding", "qmoe_8_rounding_zero_points", "qmoe_4_float16_zero_points"),
    *("grouped", "grouped_float16", "grouped_4", "grouped_8_rounding", "grouped_8_float16_zero_points"),
    *("unrolled", "unrolled_4_rounding", "switched_4", "switched_8_rounding", "switched_4_float16"),
}
"""One of each operator and kind of product, in each type that it computes in."""
CASES += [(name, inside) for name in ("moe", "qmoe_4", "switched_4", "grouped", "unrolled_4") for inside in FUSED[1:]]
CASES += [(name, inside) for name in ("grouped", "unrolled_8") for inside in OTHERS]


def is_without_tokens(name: str) -> bool:
    """Whether a layer of this way may be given no tokens: before 1.31 `TopK` of no rows ends the process."""
    return WAYS[name].lowering in (MOE, QMOE) or Version(ort.__version__) >= Version("1.31")


def name_of(case: tuple[str, Inside]) -> str:
    return f"{case[0]}, {case[1]}"


@pytest.mark.parametrize(
    ("name", "inside"),
    each_shape(CASES, {name_of(case) for case in CASES if case[1] != PLAIN or case[0] in DIFFERENT}, name=name_of),
)
def test_the_layer_is_computed(name: str, inside: Inside) -> None:
    """Of few tokens and many, of none, and where experts have none or all."""
    way = WAYS[name]
    layer, values, session = loaded(way, softmax(4, 2), inside=inside)
    for batch, length in ((1, 1), (1, 5), (4, 16)):
        x, logits = draw(batch, length, 64, 4, seed=length)
        if batch == 4:
            logits[:16, 0] += 50  # this expert has every token of the first row, and one of the others none
            logits[:, 2] -= 50
        assert_close(run(session, x, logits), compute(values, layer.gate, x, logits, activation=inside.activation), way)
    if is_without_tokens(name):
        assert run(session, *draw(2, 0, 64, 4)).shape == (2, 0, 64)


@pytest.mark.parametrize("name", ["moe", "qmoe_4", "grouped", "unrolled"])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 1), (4, 4)])
def test_few_experts_of_many_and_all_are_computed(name: str, num_experts: int, k: int) -> None:
    way = WAYS[name]
    layer, values, session = loaded(way, softmax(num_experts, k), inside=PLAIN)
    x, logits = draw(2, 9, 64, num_experts)
    assert_close(run(session, x, logits), compute(values, layer.gate, x, logits, activation="gelu_new"), way)


@pytest.mark.parametrize("name", ["moe", "moe_float16", "qmoe_4", "switched_4", "grouped"])
def test_a_gate_that_is_told_weighs_biases_as_well(name: str) -> None:
    """Weights whose sum is not 1: the operator's output times that sum."""
    way, gate = WAYS[name], routed("sigmoid", renormalize=False, scale=2.5)
    _, values, session = loaded(way, gate, inside=PLAIN)
    for length in (1, 16):
        x, logits = draw(2, length, 64, 4)
        assert_close(run(session, x, logits), compute(values, gate, x, logits, activation="gelu_new"), way)


@pytest.mark.parametrize("inside", [PLAIN, Inside("silu", biased=True)], ids=str)
@pytest.mark.parametrize("name", ["qmoe_4", "qmoe_8_rounding_zero_points", "moe", "grouped_4"])
def test_biases_of_a_width_that_no_block_divides_are_padded(name: str, inside: Inside, tmp_path: Path) -> None:
    way = WAYS[name]
    layer, values = make_layer(tmp_path, way, softmax(4, 2), inner=172, inside=inside)
    x, logits = draw(2, 8, 64, 4)
    expected = compute(values, layer.gate, x, logits, activation=inside.activation)
    assert_close(run(load(layer, way.lowering), x, logits), expected, way)


@pytest.mark.parametrize("name", ["moe", "grouped"])
def test_weights_and_biases_of_bfloat16_are_widened(name: str, tmp_path: Path) -> None:
    way = WAYS[name]._replace(element_type="bfloat16")
    layer, values = make_layer(tmp_path, way, softmax(4, 2), inside=PLAIN)
    model = build(replace(layer, element_type="float32"), way.lowering, "bfloat16")
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer if tensor.dims and tensor.dims[-1] >= 64)
    assert set(kinds) == {onnx.TensorProto.BFLOAT16}
    x, logits = draw(2, 8, 64, 4)
    expected = compute(values, layer.gate, x, logits, activation="gelu_new")
    assert_close(run(ort.InferenceSession(model.SerializeToString()), x, logits), expected, WAYS[name])


def compute_nodes(write: Callable[[GraphWriter, ir.Value], ir.Value], x: np.ndarray) -> np.ndarray:
    """What nodes give for x [N, K]."""
    graph = GraphWriter()
    given = graph_input("x", ir.DataType.FLOAT, ["rows", x.shape[1]])
    y = write(graph, given)
    y.type = ir.TensorType(ir.DataType.FLOAT)
    initializers = list(graph.initializers.values())
    written = ir.Graph([given], [y], nodes=graph.nodes, initializers=initializers, opset_imports=OPSETS, name="nodes")
    model = ir.to_proto(ir.Model(written, ir_version=IR_VERSION))
    found: np.ndarray = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_transformers_own(activation: str) -> None:
    """Gated and not, on what is far from zero too."""
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
    active = ACT2FN[activation](x)
    for is_gated, expected in ((False, active), (True, active[:, :1] * x[:, 1:])):
        found = compute_nodes(
            lambda graph, value, is_gated=is_gated: add_inner(graph, value, is_gated, "ffn", ACTIVATIONS[activation]),
            x.float().numpy(),
        )
        # float32's sigmoid and erf err by 1.5e-7, and are multiplied by up to 12 here
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=4e-6)


def test_a_static_product_has_a_bias() -> None:
    """int8-qdq: inputs rounded by a scale of the file, weights by one a row, and the bias as it is."""
    codes = torch.arange(1, 97, dtype=torch.uint8).reshape(4, 1, 24)
    scales, bias = torch.tensor([0.5, 0.25, 1.0, 2.0]), torch.tensor([1.0, -2.0, 3.0, 0.5])

    class Static(QuantizedWeight):
        def read(self) -> Quantized:
            return Quantized(codes, scales[:, None])

    class Given(Bias):
        def read(self) -> torch.Tensor:
            return bias

    entry = TensorEntry("w", Path(), "F32", (4, 24), 0, 384)
    weight = Static(entry, {}, (4, 24), 8, 24, is_static=True, input_scale=0.1)
    linear = Linear(weight, Given(TensorEntry("b", Path(), "F32", (4,), 0, 16)))
    x = np.linspace(-9, 9, 72, dtype=np.float32).reshape(3, 24)
    found = compute_nodes(lambda graph, value: add_linear(graph, value, linear, "y", 8), x)
    rounded = np.round(x.astype(np.float64) / np.float32(0.1)) * np.float32(0.1)
    matrix = (codes.double().view(4, 24) - 128) * scales.double()[:, None]
    np.testing.assert_allclose(found, rounded @ matrix.numpy().T + bias.numpy(), rtol=1e-5)


# What the runtime does with them


@pytest.mark.parametrize("name", ["grouped", "grouped_8_rounding"])
def test_onnxruntime_takes_biases_into_the_products(name: str, tmp_path: Path) -> None:
    """So they cost no node, as `grouped` says of its nodes."""
    way = WAYS[name]
    layer, _ = make_layer(tmp_path, way, softmax(4, 2), inside=PLAIN)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(build(layer, way.lowering).SerializeToString(), options)
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert nodes["Gemm"] + nodes["MatMulNBits"] == 8
    assert not nodes["Add"]


def test_the_operators_gelu_is_not_the_one_with_erf(tmp_path: Path) -> None:
    """Why it is refused: written all the same, it errs by a hundred times what float32 rounds."""
    way = WAYS["moe"]
    layer, values = make_layer(tmp_path, way, softmax(4, 2), inside=PLAIN)
    x, logits = draw(2, 16, 64, 4)
    found = run(load(layer, MOE), x, logits)
    expected = compute(values, layer.gate, x, logits, activation="gelu")
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 50 * way.tolerance < error < 1e-2


# What is refused, and which runtime is needed


@pytest.mark.parametrize(
    ("name", "inside", "device", "reason"),
    [
        (
            "moe",
            Inside("gelu", gated=False),
            "cpu",
            "moe: the operator's GELU is the tanh form, and this one is the erf form; 'grouped' computes it",
        ),
        (
            "qmoe_4",
            Inside("relu2", gated=False),
            "cpu",
            "qmoe: the operator knows relu, silu, gelu_tanh, not relu2; 'grouped' computes it",
        ),
        ("moe", Inside("relu"), "cpu", "moe: the operator's gate is SiLU or quick-GELU, not relu"),
        ("moe", PLAIN, "cuda", "moe: CUDA's operator was looked into for gated experts alone"),
    ],
)
def test_what_an_operator_does_not_know_is_refused(
    name: str, inside: Inside, device: str, reason: str, tmp_path: Path
) -> None:
    layer, _ = make_layer(tmp_path, WAYS[name], softmax(4, 2), inside=inside)
    layer = replace(layer, device=device)
    message = f"export.lowering 'fused' cannot express layer ({reason}); use 'auto'"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        find_lowerings(layer, "fused")
    assert find_lowerings(layer, "auto") == (GROUPED, UNROLLED)


def test_switched_is_refused_where_its_operator_is(tmp_path: Path) -> None:
    layer, _ = make_layer(tmp_path, WAYS["qmoe_4"], softmax(4, 2), inside=Inside("gelu", gated=False, biased=True))
    with pytest.raises(ExportError, match=r"^export.lowering 'switched' cannot express layer .*the erf form"):
        find_lowerings(layer, "switched")


@pytest.mark.parametrize(
    ("name", "inside", "inner", "version"),
    [
        ("moe", PLAIN, 96, "1.23.1"),
        ("grouped_4", PLAIN, 96, "1.20"),
        ("grouped_8", PLAIN, 96, "1.23"),
        ("qmoe_4", Inside("silu", biased=True), 96, "1.23.2"),
        ("qmoe_4", PLAIN, 96, "1.24.3"),
        ("qmoe_8_rounding", PLAIN, 96, "1.24.3"),
        ("qmoe_4", GATED, 32, "1.24.3"),  # one block along the FFN's width
        ("qmoe_8_rounding", GATED, 32, "1.23.2"),
        ("qmoe_4_rounding", PLAIN, 96, "1.31"),
    ],
    ids=str,
)
def test_each_layer_knows_the_oldest_runtime_that_computes_it(
    name: str, inside: Inside, inner: int, version: str, tmp_path: Path
) -> None:
    """Found by running such layers on every minor release from 1.20 on."""
    layer, _ = make_layer(tmp_path, WAYS[name], softmax(4, 2), inner=inner, inside=inside)
    assert WAYS[name].lowering.min_onnxruntime(layer) == version


def test_gated_experts_with_biases_for_cuda_run_on_the_cpu(tmp_path: Path) -> None:
    way, inside = WAYS["qmoe_4_float16"], Inside("silu", biased=True)
    layer, values = make_layer(tmp_path, way, softmax(4, 2), hidden=128, inner=172, block=64, inside=inside)
    layer = replace(layer, device="cuda")
    x, logits = draw(2, 8, 128, 4)
    assert_close(run(load(layer, QMOE), x, logits), compute(values, layer.gate, x, logits), way)


def test_auto_finds_every_lowering_of_what_the_operators_know(tmp_path: Path) -> None:
    for inside in FUSED:
        layer, _ = make_layer(tmp_path, WAYS["qmoe_4"], softmax(4, 2), inside=inside)
        assert find_lowerings(layer, "auto", "1.32.0") == (QMOE, GROUPED, UNROLLED)
        assert find_lowerings(layer, "switched") == (SWITCHED,)
