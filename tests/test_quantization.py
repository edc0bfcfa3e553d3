"""Blocks of integers mean to onnxruntime what they mean here, and come as near to the weights as their scales allow."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.quantization import Quantized, dequantize, num_blocks, quantize

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128)
WIDTHS = (128, 172, 40, 17)  # the last three are divided by no block


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode(quantized: Quantized, width: int, bits: int) -> np.ndarray:
    """What the codes stand for, one weight at a time as the format's documentation says it."""
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    rows, _, block_bytes = codes.shape
    per_byte = 8 // bits
    weight = np.empty((rows, width), np.float32)
    for row in range(rows):
        for column in range(width):
            block, place = divmod(column, block_bytes * per_byte)
            byte = int(codes[row, block, place // per_byte])
            code = byte if bits == 8 else (byte >> 4 if place % 2 else byte & 15)
            weight[row, column] = np.float32(code - 2 ** (bits - 1)) * scales[row, block]
    return weight


def squared_error(weight: torch.Tensor, approximation: torch.Tensor, block_size: int) -> np.ndarray:
    """Of every block, in float64."""
    error = (weight.double() - approximation.double()).square().numpy()
    return np.add.reduceat(error, range(0, weight.shape[1], block_size), axis=1)


def run_node(node: onnx.NodeProto, inputs: dict[str, np.ndarray], initializers: dict[str, np.ndarray]) -> np.ndarray:
    declared = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for name, x in inputs.items()]
    graph = helper.make_graph(
        [node], "one_node", declared, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in initializers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)[0]


def matmul(x: np.ndarray, quantized: Quantized, width: int, bits: int, block_size: int, accuracy_level: int) -> np.ndarray:
    rows = len(quantized.codes)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=width, N=rows, bits=bits, block_size=block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    return run_node(node, {"x": x}, {"codes": quantized.codes.numpy(), "scales": quantized.scales.numpy().ravel()})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_matmul_n_bits_reads_the_codes_as_dequantize_does(bits: int, block_size: int, width: int) -> None:
    rows = 5
    quantized = quantize(draw(rows, width), bits, block_size)
    weight = dequantize(quantized, width, bits)
    np.testing.assert_array_equal(weight.numpy(), decode(quantized, width, bits))
    # Rows of the unit matrix pick single weights out, without rounding.
    np.testing.assert_array_equal(matmul(np.eye(width, dtype=np.float32), quantized, width, bits, block_size, 1), weight.numpy().T)
    x = draw(1, width, seed=1).numpy()
    expected = x.astype(np.float64) @ weight.double().numpy().T
    # One row goes another way through the kernel. Float32 sums of at most 172 products, up to 30 in size: 5e-6 measured.
    np.testing.assert_allclose(matmul(x, quantized, width, bits, block_size, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_matmul_n_bits_with_8_bit_activations_is_off_by_their_rounding_alone(bits: int, width: int) -> None:
    quantized = quantize(draw(5, width), bits, 32)
    x = draw(3, width, seed=1).numpy()
    expected = x.astype(np.float64) @ dequantize(quantized, width, bits).double().numpy().T
    found = matmul(x, quantized, width, bits, 32, 4)
    # An activation is off by at most half of 1/127 of the largest; the errors of a sum add up like its root: 0.9 of this measured.
    deviation = np.abs(x).max() / 254 / np.sqrt(3) * np.sqrt(width) * dequantize(quantized, width, bits).abs().max().item()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5 * deviation)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_gather_block_quantized_reads_the_same_codes(bits: int, block_size: int) -> None:
    rows, width = 7, 128
    quantized = quantize(draw(rows, width), bits, block_size)
    ids = np.array([[3, 0, 6], [1, 1, 5]], np.int64)
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales"], ["y"], domain="com.microsoft",
        bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    found = run_node(node, {"ids": ids}, {"codes": quantized.codes.flatten(1).numpy(), "scales": quantized.scales.numpy()})
    np.testing.assert_array_equal(found, decode(quantized, width, bits)[ids])


@pytest.mark.parametrize("block_size", BLOCKS)
def test_qmoe_reads_the_same_codes(block_size: int) -> None:
    hidden, inner, bits = 128, 128, 4  # 8-bit weights would bring in the rounding of activations
    parts = [quantize(draw(rows, width, seed=seed), bits, block_size) for seed, rows, width in ((0, 2 * inner, hidden), (1, hidden, inner))]
    node = helper.make_node(
        "QMoE", ["x", "logits", "fc1", "fc1_scales", "", "fc2", "fc2_scales"], ["y"], domain="com.microsoft",
        k=1, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1,
        expert_weight_bits=bits, block_size=block_size,
    )  # fmt: skip
    initializers = {}
    for name, part in zip(("fc1", "fc2"), parts, strict=True):
        initializers |= {name: part.codes.flatten(1)[None].numpy(), f"{name}_scales": part.scales[None].numpy()}
    x = draw(3, hidden, seed=2).numpy() / 10
    found = run_node(node, {"x": x, "logits": np.zeros((3, 1), np.float32)}, initializers)
    both = x.astype(np.float64) @ decode(parts[0], hidden, bits).T
    gate, up = both[:, 0::2], both[:, 1::2]
    expected = gate / (1 + np.exp(-gate)) * up @ decode(parts[1], inner, bits).T
    # Float32 sums of 128 products twice: 1e-6 of the largest value measured.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_within_the_range_of_integers_is_off_by_at_most_half_a_step(bits: int, block_size: int, width: int) -> None:
    weight = draw(33, width)
    quantized = quantize(weight, bits, block_size)
    step = quantized.scales.double().abs().repeat_interleave(block_size, 1)[:, :width]
    sign = quantized.scales.double().sign().repeat_interleave(block_size, 1)[:, :width]
    error = (weight.double() - dequantize(quantized, width, bits).double()).abs()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    in_steps = weight.double() / step * sign
    within = (in_steps >= low - 0.5) & (in_steps <= high + 0.5)
    # Float32 rounding of the quotient moves a tie by 1e-7 of up to 128 steps.
    assert (error[within] <= step[within] * (0.5 + 2e-5)).all()
    # The others are cut to the end of the range, and they are few: a scale that cuts much would have lost the search.
    beyond = torch.where(in_steps < 0, low, high) * step * sign
    assert torch.allclose(dequantize(quantized, width, bits).double()[~within], beyond[~within], rtol=1e-6, atol=0)
    assert (~within).double().mean() < (0.02 if bits == 4 else 0.002)  # measured .011 and .0008


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_no_block_is_worse_than_rounding_to_the_nearest_with_the_largest_weight_at_an_end(bits: int, block_size: int, width: int, seed: int) -> None:
    weight = draw(33, width, seed=seed) ** 3  # with outliers
    found = squared_error(weight, dequantize(quantize(weight, bits, block_size), width, bits), block_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks = torch.nn.functional.pad(weight, (0, num_blocks(width, block_size) * block_size - width)).view(33, -1, block_size)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    for end in (low, high):
        scale = extreme / end
        plain = ((blocks / scale).round().clamp(low, high) * scale).flatten(1)[:, :width]
        limit = squared_error(weight, plain, block_size)
        # The search compares sums of squares in float32: equal to 1e-6 of the sum.
        assert (found <= limit * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_search_of_scales_gains_where_it_is_made(bits: int) -> None:
    weight = draw(64, 128)
    scale = weight.view(64, 4, 32).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    plain = ((weight.view(64, 4, 32) / scale).round() * scale).flatten(1)
    found = squared_error(weight, dequantize(quantize(weight, bits, 32), 128, bits), 32).sum()
    # Measured .70 and .86: 4 bits have eight candidates, 8 bits two.
    assert found < squared_error(weight, plain, 32).sum() * {4: 0.75, 8: 0.9}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_zero_blocks_stay_exactly_zero(bits: int) -> None:
    weight = draw(4, 96)
    weight[1], weight[2, 32:64], weight[3] = 0, 0, -0.0
    quantized = quantize(weight, bits, 32)
    back = dequantize(quantized, 96, bits)
    assert torch.equal(quantized.scales == 0, torch.tensor([[False] * 3, [True] * 3, [False, True, False], [True] * 3]))
    assert (back[1] == 0).all()
    assert (back[2, 32:64] == 0).all()
    assert (back[3] == 0).all()
    zero_byte = 128 if bits == 8 else 0x88
    assert (quantized.codes[1] == zero_byte).all()
    found = matmul(draw(2, 96).numpy(), quantized, 96, bits, 32, 1)
    assert (found[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_padding_of_the_last_block_is_zero_to_onnxruntime_too(bits: int) -> None:
    quantized = quantize(draw(3, 17), bits, 16)
    back = dequantize(quantized, 32, bits)
    assert (back[:, 17:] == 0).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 3.7, -0.02, 1e-30, -1e30])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_row_is_kept_to_one_rounding(bits: int, value: float) -> None:
    weight = torch.full((2, 50), value)
    back = dequantize(quantize(weight, bits, 32), 50, bits)
    # The scale is the value over an integer, so two float32 roundings (6e-8 each) and the least-squares sum are between them.
    np.testing.assert_allclose(back.numpy(), weight.numpy(), rtol=5e-7)


@pytest.mark.parametrize("value", [1.0, -0.3, 0.0, 7e20])
@pytest.mark.parametrize("bits", BITS)
def test_a_single_weight_is_kept_to_one_rounding(bits: int, value: float) -> None:
    quantized = quantize(torch.tensor([[value]]), bits, 16)
    assert quantized.codes.shape == (1, 1, 16 * bits // 8)
    assert quantized.scales.shape == (1, 1)
    np.testing.assert_allclose(dequantize(quantized, 1, bits).numpy(), [[value]], rtol=5e-7)  # two float32 roundings


@pytest.mark.parametrize("exponent", [-120, -60, -20, 20, 60, 120])
@pytest.mark.parametrize("bits", BITS)
def test_powers_of_two_change_the_scales_alone(bits: int, exponent: int) -> None:
    weight = draw(8, 70).clamp(-3.9, 3.9)
    plain, large = (quantize(w, bits, 32) for w in (weight, torch.ldexp(weight, torch.tensor(exponent))))
    assert torch.equal(large.codes, plain.codes)
    assert torch.equal(large.scales, torch.ldexp(plain.scales, torch.tensor(exponent)))


@pytest.mark.parametrize("size", [3.4e38, 1e-38, 1e-42, 1e-45])
@pytest.mark.parametrize("bits", BITS)
def test_magnitudes_at_the_ends_of_float32_stay_finite(bits: int, size: float) -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.0, -0.25, 1e-3]]) * torch.tensor(size)
    quantized = quantize(weight, bits, 16)
    back = dequantize(quantized, 6, bits)
    assert torch.isfinite(quantized.scales).all()
    assert torch.isfinite(back).all()
    # Two equal extremes of opposite sign: one is cut by a whole step. A scale can only be a multiple of 2^-149, float32's smallest.
    assert ((back - weight).double().abs() <= quantized.scales.double().abs() + 2 ** (bits - 1) * 2**-149).all()


def test_one_large_weight_beside_tiny_ones_costs_the_tiny_ones_alone() -> None:
    weight = torch.full((1, 32), 1e-20)
    weight[0, 5] = 1e20
    back = dequantize(quantize(weight, 4, 32), 32, 4)
    assert back[0, 5] == pytest.approx(1e20, rel=5e-7)  # two float32 roundings
    assert (back[0, :5] == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, bits: int) -> None:
    weight = torch.zeros(3, 5)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=f"^{re.escape('weight of shape (3, 5) must be a matrix of finite values')}$"):
        quantize(weight, bits, 16)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'weight of shape {shape} must be a matrix of finite values')}$"):
        quantize(torch.zeros(shape), 8, 16)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantized_weights_quantize_to_themselves(bits: int, block_size: int, width: int) -> None:
    once = dequantize(quantize(draw(33, width), bits, block_size), width, bits)
    again = dequantize(quantize(once, bits, block_size), width, bits)
    # The scale is fitted again by float32 sums.
    np.testing.assert_allclose(again.numpy(), once.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_quantized_in_float32(dtype: torch.dtype) -> None:
    weight = draw(6, 40).to(dtype)
    half, full = quantize(weight, 4, 16), quantize(weight.float(), 4, 16)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.scales, full.scales)
    assert half.scales.dtype == torch.float32


def test_a_weight_of_many_chunks_is_the_same_as_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(10, 40)
    whole = quantize(weight, 4, 16)
    monkeypatch.setattr("export.quantization._CHUNK_ELEMENTS", 3 * 48)
    chunked = quantize(weight, 4, 16)
    rows: list[Any] = [quantize(weight[n : n + 1], 4, 16) for n in range(10)]
    for found in (chunked, Quantized(torch.cat([r.codes for r in rows]), torch.cat([r.scales for r in rows]))):
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.scales, whole.scales)


def test_num_blocks_counts_the_padded_one() -> None:
    assert [num_blocks(width, 16) for width in (1, 15, 16, 17, 32)] == [1, 1, 1, 2, 2]
