"""Blocks of integers mean to onnxruntime what they mean here, and come as near to the weights as their scales allow."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from packaging.version import Version

from dense2moe.export.quantization.blockwise import (
    Quantized,
    dequantize,
    join,
    num_blocks,
    quantize,
    recover,
    round_to_nearest,
)
from dense2moe.export.quantization.gptq import prepare_moments, quantize_gptq

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128)
WIDTHS = (128, 172, 40, 17)  # the last three are divided by no block
ZERO_POINTS = pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])


Method = Callable[[torch.Tensor, int, int, bool], Quantized]


def by_rounding(weight: torch.Tensor, bits: int, block_size: int, zero_points: bool) -> Quantized:
    return round_to_nearest(weight, bits, block_size, zero_points=zero_points)


def by_search(weight: torch.Tensor, bits: int, block_size: int, zero_points: bool) -> Quantized:
    return quantize(weight, bits, block_size, zero_points=zero_points)


def by_gptq(weight: torch.Tensor, bits: int, block_size: int, zero_points: bool) -> Quantized:
    """For inputs that depend on each other."""
    inputs = draw(200, weight.shape[1], seed=7)
    inputs = inputs + inputs[:, :1]
    return quantize_gptq(
        weight, prepare_moments(inputs.T @ inputs, block_size), bits, block_size, zero_points=zero_points
    )


METHODS = pytest.mark.parametrize("method", [by_rounding, by_search, by_gptq])
EACH_WEIGHT_BY_ITSELF = pytest.mark.parametrize("method", [by_rounding, by_search])
NO_MATRIX = "weight of shape {} must be a matrix of finite values"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode(quantized: Quantized, width: int, bits: int) -> np.ndarray:
    """What the codes stand for, one weight at a time as the format's documentation says it."""
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    rows, _, block_bytes = codes.shape
    per_byte = 8 // bits

    def read(packed: np.ndarray, place: int) -> int:
        byte = int(packed[place // per_byte])
        return byte if bits == 8 else (byte >> 4 if place % 2 else byte & 15)

    weight = np.empty((rows, width), np.float32)
    for row in range(rows):
        for column in range(width):
            block, place = divmod(column, block_bytes * per_byte)
            zero = 2 ** (bits - 1) if quantized.zero_points is None else read(quantized.zero_points[row].numpy(), block)
            weight[row, column] = np.float32(read(codes[row, block], place) - zero) * scales[row, block]
    return weight


def read_zero_points(quantized: Quantized, bits: int) -> torch.Tensor:
    """The zero point of every block, float64."""
    rows, blocks = quantized.scales.shape
    if quantized.zero_points is None:
        return torch.full((rows, blocks), 2.0 ** (bits - 1), dtype=torch.float64)
    places = [
        [(int(row[n // 2]) >> 4 * (n % 2)) & 15 if bits == 4 else int(row[n]) for n in range(blocks)]
        for row in quantized.zero_points
    ]
    return torch.tensor(places, dtype=torch.float64)


def squared_error(weight: torch.Tensor, approximation: torch.Tensor, block_size: int) -> np.ndarray:
    """Of every block, in float64."""
    error = (weight.double() - approximation.double()).square().numpy()
    return np.add.reduceat(error, range(0, weight.shape[1], block_size), axis=1)


def run_node(node: onnx.NodeProto, inputs: dict[str, np.ndarray], initializers: dict[str, np.ndarray]) -> np.ndarray:
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in inputs.items()
    ]
    graph = helper.make_graph(
        [node],
        "one_node",
        declared,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in initializers.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)[0]


def matmul(
    x: np.ndarray, quantized: Quantized, width: int, bits: int, block_size: int, accuracy_level: int
) -> np.ndarray:
    initializers = {"codes": quantized.codes.numpy(), "scales": quantized.scales.numpy().ravel()}
    if quantized.zero_points is not None:
        initializers["zero_points"] = quantized.zero_points.numpy().ravel()
    node = helper.make_node(
        "MatMulNBits",
        ["x", *initializers],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=len(quantized.codes),
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )
    return run_node(node, {"x": x}, initializers)


@ZERO_POINTS
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_matmul_n_bits_reads_the_codes_as_dequantize_does(
    bits: int, block_size: int, width: int, zero_points: bool
) -> None:
    rows = 5
    quantized = quantize(draw(rows, width), bits, block_size, zero_points=zero_points)
    assert (quantized.zero_points is not None) is zero_points
    weight = dequantize(quantized, width, bits)
    np.testing.assert_array_equal(weight.numpy(), decode(quantized, width, bits))
    # Rows of the unit matrix pick single weights out, without rounding.
    np.testing.assert_array_equal(
        matmul(np.eye(width, dtype=np.float32), quantized, width, bits, block_size, 1), weight.numpy().T
    )
    x = draw(1, width, seed=1).numpy()
    expected = x.astype(np.float64) @ weight.double().numpy().T
    # One row goes another way through the kernel. Float32 sums of at most 172 products, up to 30 in size: 5e-6
    # measured.
    np.testing.assert_allclose(matmul(x, quantized, width, bits, block_size, 1), expected, rtol=0, atol=1e-5)


@ZERO_POINTS
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_matmul_n_bits_with_8_bit_activations_is_off_by_their_rounding_alone(
    bits: int, width: int, zero_points: bool
) -> None:
    quantized = quantize(draw(5, width), bits, 32, zero_points=zero_points)
    x = draw(3, width, seed=1).numpy()
    expected = x.astype(np.float64) @ dequantize(quantized, width, bits).double().numpy().T
    found = matmul(x, quantized, width, bits, 32, 4)
    # An activation is off by at most half of 1/127 of the largest; the errors of a sum add up like its root: 0.9 of
    # this measured.
    deviation = (
        np.abs(x).max() / 254 / np.sqrt(3) * np.sqrt(width) * dequantize(quantized, width, bits).abs().max().item()
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5 * deviation)


@ZERO_POINTS
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_gather_block_quantized_reads_the_same_codes(
    bits: int, block_size: int, blocks: int, zero_points: bool
) -> None:
    if zero_points and bits == 4 and blocks % 2 and Version(ort.__version__) < Version("1.27"):
        pytest.skip(
            "rows of an odd number of 4-bit zero points are misread before onnxruntime 1.27; the graph has other "
            "nodes then"
        )
    rows, width = 7, blocks * block_size
    quantized = quantize(draw(rows, width), bits, block_size, zero_points=zero_points)
    ids = np.array([[3, 0, 6], [1, 1, 5]], np.int64)
    initializers = {"codes": quantized.codes.flatten(1).numpy(), "scales": quantized.scales.numpy()}
    if quantized.zero_points is not None:
        initializers["zero_points"] = quantized.zero_points.numpy()
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "ids", "scales", "zero_points"][: 3 + zero_points],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_array_equal(run_node(node, {"ids": ids}, initializers), decode(quantized, width, bits)[ids])


@ZERO_POINTS
@pytest.mark.parametrize(("hidden_blocks", "inner_blocks"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_qmoe_reads_the_same_codes(
    bits: int, block_size: int, hidden_blocks: int, inner_blocks: int, zero_points: bool
) -> None:
    needed = "1.31" if hidden_blocks == 1 or (zero_points and inner_blocks == 1) else "1.24.3"
    if Version(ort.__version__) < Version(needed):
        pytest.skip(f"needs onnxruntime {needed}")
    hidden, inner = hidden_blocks * block_size, inner_blocks * block_size
    shapes = ((0, 2 * inner, hidden), (1, hidden, inner))
    parts = [
        quantize(draw(rows, width, seed=seed), bits, block_size, zero_points=zero_points)
        for seed, rows, width in shapes
    ]
    names = [
        "x",
        "logits",
        "fc1",
        "fc1_scales",
        "",
        "fc2",
        "fc2_scales",
        "",
        "",
        "",
        "",
        "fc1_zero_points",
        "fc2_zero_points",
    ]
    node = helper.make_node(
        "QMoE",
        names[: 13 if zero_points else 7],
        ["y"],
        domain="com.microsoft",
        k=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        expert_weight_bits=bits,
        block_size=block_size,
    )
    initializers = {}
    for name, part in zip(("fc1", "fc2"), parts, strict=True):
        initializers |= {name: part.codes.flatten(1)[None].numpy(), f"{name}_scales": part.scales[None].numpy()}
        if part.zero_points is not None:
            initializers[f"{name}_zero_points"] = part.zero_points[None].numpy()
    x = draw(3, hidden, seed=2).numpy() / 10
    found = run_node(node, {"x": x, "logits": np.zeros((3, 1), np.float32)}, initializers)
    both = x.astype(np.float64) @ decode(parts[0], hidden, bits).T
    gate, up = both[:, 0::2], both[:, 1::2]
    expected = gate / (1 + np.exp(-gate)) * up @ decode(parts[1], inner, bits).T
    # Float32 sums of 384 products twice: 1e-6 of the largest value measured. Beside 8-bit weights activations are
    # rounded to 8 bits: 1.6e-2.
    np.testing.assert_allclose(found, expected, rtol=0, atol={4: 1e-5, 8: 3e-2}[bits] * np.abs(expected).max())


@ZERO_POINTS
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("method", [by_rounding, by_search, by_gptq])
@pytest.mark.parametrize("bits", BITS)
def test_integers_follow_from_the_weights_and_their_scales(
    bits: int, method: Method, size: float, zero_points: bool
) -> None:
    for width in WIDTHS:
        weight = draw(24, width)
        weight[3], weight[:, :16] = 0, 0
        quantized = method(weight, bits, 16, zero_points)
        quantized = Quantized(quantized.codes, quantized.scales * size, quantized.zero_points)
        columns = 1 + draw(width, seed=3).abs()
        # numbers below the normal ones have few digits
        for divided in (torch.ones(width), columns)[: 1 if size < 1e-30 else 2]:
            found = recover(
                dequantize(quantized, width, bits) / divided * divided,
                quantized.scales,
                quantized.zero_points,
                bits,
                16,
            )
            assert torch.equal(found.codes, quantized.codes)


@ZERO_POINTS
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_within_the_range_of_integers_is_off_by_at_most_half_a_step(
    bits: int, block_size: int, width: int, zero_points: bool
) -> None:
    weight = draw(33, width)
    quantized = quantize(weight, bits, block_size, zero_points=zero_points)
    step = quantized.scales.double().abs().repeat_interleave(block_size, 1)[:, :width]
    sign = quantized.scales.double().sign().repeat_interleave(block_size, 1)[:, :width]
    error = (weight.double() - dequantize(quantized, width, bits).double()).abs()
    low = -read_zero_points(quantized, bits).repeat_interleave(block_size, 1)[:, :width]
    high = low + 2**bits - 1
    in_steps = weight.double() / step * sign
    within = (in_steps >= low - 0.5) & (in_steps <= high + 0.5)
    # Float32 rounding of the quotient moves a tie by 1e-7 of up to 128 steps.
    assert (error[within] <= step[within] * (0.5 + 2e-5)).all()
    # The others are cut to the end of the range, and they are few: a scale that cuts much would have lost the search.
    beyond = torch.where(in_steps < 0, low, high) * step * sign
    assert torch.allclose(dequantize(quantized, width, bits).double()[~within], beyond[~within], rtol=1e-6, atol=0)
    # Measured .013, .0008 and .0053: a zero point rounded to an integer leaves one end of the range a little short.
    assert (~within).double().mean() < (0.02 if bits == 4 else 0.008 if zero_points else 0.002)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_no_block_is_worse_than_rounding_to_the_nearest_with_the_largest_weight_at_an_end(
    bits: int, block_size: int, width: int, seed: int
) -> None:
    weight = draw(33, width, seed=seed) ** 3  # with outliers
    found = squared_error(weight, dequantize(quantize(weight, bits, block_size), width, bits), block_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks = torch.nn.functional.pad(weight, (0, num_blocks(width, block_size) * block_size - width)).view(
        33, -1, block_size
    )
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    for end in (low, high):
        scale = extreme / end
        plain = ((blocks / scale).round().clamp(low, high) * scale).flatten(1)[:, :width]
        limit = squared_error(weight, plain, block_size)
        # The search compares sums of squares in float32: equal to 1e-6 of the sum.
        assert (found <= limit * (1 + 1e-5)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_a_zero_point_is_never_worse_than_none_nor_than_the_range_of_the_block(
    bits: int, block_size: int, width: int
) -> None:
    weight = draw(33, width) ** 3
    ways = (
        by_search(weight, bits, block_size, True),
        by_search(weight, bits, block_size, False),
        by_rounding(weight, bits, block_size, True),
    )
    found, symmetric, plain = (
        squared_error(weight, dequantize(quantized, width, bits), block_size) for quantized in ways
    )
    # Sums of squares are compared in float32, and the plain scale, refitted by least squares, cuts an extreme at times.
    assert (found <= symmetric * (1 + 1e-5)).all()
    assert (found.sum(1) <= plain.sum(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_point_nearly_doubles_the_levels_of_weights_on_one_side_of_zero(bits: int) -> None:
    weight = draw(64, 128).abs()
    found, symmetric = (
        squared_error(weight, dequantize(quantize(weight, bits, 32, zero_points=z), 128, bits), 32).sum()
        for z in (True, False)
    )
    assert found < 0.3 * symmetric  # by the squares of the steps (8/15)² and (128/255)²; measured .29 and .28


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_points_by_rounding_are_those_of_onnxruntime_s_own_quantizer(width: int) -> None:
    """Its blocks are symmetric or have zero points by the same rule as ours.

    The range of the block, zero included, to that of the codes.
    """
    weight, block_size, blocks = draw(9, width), 32, num_blocks(width, 32)
    packed = np.zeros((9, blocks, 16), np.uint8)
    scales, zero_points = np.zeros(9 * blocks, np.float32), np.zeros(9 * ((blocks + 1) // 2), np.uint8)
    quantize_matmul_4bits(
        packed, np.ascontiguousarray(weight.numpy().T), scales, zero_points, block_size, 9, width, False
    )
    found = round_to_nearest(weight, 4, block_size, zero_points=True)
    theirs = Quantized(
        torch.from_numpy(packed), torch.from_numpy(scales).view(9, blocks), torch.from_numpy(zero_points).view(9, -1)
    )
    np.testing.assert_allclose(found.scales.numpy(), theirs.scales.numpy(), rtol=1e-6)
    assert torch.equal(read_zero_points(found, 4), read_zero_points(theirs, 4))
    # A weight halfway between two integers may go either way.
    assert (dequantize(found, width, 4) - dequantize(theirs, width, 4)).abs().gt(1e-5).double().mean() < 0.01


@pytest.mark.parametrize("bits", BITS)
def test_the_search_of_scales_gains_where_it_is_made(bits: int) -> None:
    weight = draw(64, 128)
    scale = weight.view(64, 4, 32).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    plain = ((weight.view(64, 4, 32) / scale).round() * scale).flatten(1)
    found = squared_error(weight, dequantize(quantize(weight, bits, 32), 128, bits), 32).sum()
    # Measured .70 and .86: 4 bits have eight candidates, 8 bits two.
    assert found < squared_error(weight, plain, 32).sum() * {4: 0.75, 8: 0.9}[bits]


@EACH_WEIGHT_BY_ITSELF
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_zero_blocks_stay_exactly_zero(bits: int, zero_points: bool, method: Method) -> None:
    weight = draw(4, 96)
    weight[1], weight[2, 32:64], weight[3] = 0, 0, -0.0
    quantized = method(weight, bits, 32, zero_points)
    back = dequantize(quantized, 96, bits)
    assert torch.equal(quantized.scales == 0, torch.tensor([[False] * 3, [True] * 3, [False, True, False], [True] * 3]))
    assert (back[1] == 0).all()
    assert (back[2, 32:64] == 0).all()
    assert (back[3] == 0).all()
    zero_byte = 128 if bits == 8 else 0x88
    assert (quantized.codes[1] == zero_byte).all()
    found = matmul(draw(2, 96).numpy(), quantized, 96, bits, 32, 1)
    assert (found[:, [1, 3]] == 0).all()


@METHODS
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_the_padding_of_the_last_block_is_zero_to_onnxruntime_too(bits: int, zero_points: bool, method: Method) -> None:
    quantized = method(draw(3, 17) + 5, bits, 16, zero_points)
    back = dequantize(quantized, 32, bits)
    assert (back[:, 17:] == 0).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 3.7, -0.02, 1e-30, -1e30])
@METHODS
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_row_is_kept_to_one_rounding(bits: int, value: float, zero_points: bool, method: Method) -> None:
    weight = torch.full((2, 50), value)
    back = dequantize(method(weight, bits, 32, zero_points), 50, bits)
    # The scale is the value over an integer, so two float32 roundings (6e-8 each) and the least-squares sum are between
    # them.
    np.testing.assert_allclose(back.numpy(), weight.numpy(), rtol=5e-7)


@pytest.mark.parametrize("value", [1.0, -0.3, 0.0, 7e20])
@METHODS
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_a_single_weight_is_kept_to_one_rounding(bits: int, value: float, zero_points: bool, method: Method) -> None:
    quantized = method(torch.tensor([[value]]), bits, 16, zero_points)
    assert quantized.codes.shape == (1, 1, 16 * bits // 8)
    assert quantized.scales.shape == (1, 1)
    np.testing.assert_allclose(dequantize(quantized, 1, bits).numpy(), [[value]], rtol=5e-7)  # two float32 roundings


@pytest.mark.parametrize("exponent", [-120, -60, -20, 20, 60, 120])
@EACH_WEIGHT_BY_ITSELF
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_powers_of_two_change_the_scales_alone(bits: int, exponent: int, zero_points: bool, method: Method) -> None:
    weight = draw(8, 70).clamp(-3.9, 3.9)
    plain, large = (method(w, bits, 32, zero_points) for w in (weight, torch.ldexp(weight, torch.tensor(exponent))))
    assert torch.equal(read_zero_points(large, bits), read_zero_points(plain, bits))
    assert torch.equal(large.codes, plain.codes)
    assert torch.equal(large.scales, torch.ldexp(plain.scales, torch.tensor(exponent)))


@pytest.mark.parametrize("size", [3.1e38, 1e-38, 1e-42, 1e-45])
@METHODS
@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_magnitudes_at_the_ends_of_float32_stay_finite(
    bits: int, size: float, zero_points: bool, method: Method
) -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.0, -0.25, 1e-3]]) * torch.tensor(size)
    quantized = method(weight, bits, 16, zero_points)
    back = dequantize(quantized, 6, bits)
    assert torch.isfinite(quantized.scales).all()
    assert torch.isfinite(back).all()
    # Two equal extremes of opposite sign: one is cut by a whole step, or put half a step beyond. A scale can only be a
    # multiple of 2^-149.
    assert ((back - weight).double().abs() <= quantized.scales.double().abs() + 2 ** (bits - 1) * 2**-149).all()


def test_one_large_weight_beside_tiny_ones_costs_the_tiny_ones_alone() -> None:
    weight = torch.full((1, 32), 1e-20)
    weight[0, 5] = 1e20
    back = dequantize(quantize(weight, 4, 32), 32, 4)
    assert back[0, 5] == pytest.approx(1e20, rel=5e-7)  # two float32 roundings
    assert (back[0, :5] == 0).all()


@METHODS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, bits: int, method: Method) -> None:
    weight = torch.zeros(3, 5)
    weight[1, 2] = value
    message = (
        "weight (3, 5) must be finite, and 5 wide as its moments" if method is by_gptq else NO_MATRIX.format((3, 5))
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method(weight, bits, 16, False)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    for method in (by_rounding, by_search):
        with pytest.raises(ValueError, match=f"^{re.escape(NO_MATRIX.format(shape))}$"):
            method(torch.zeros(shape), 8, 16, False)


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


@ZERO_POINTS
def test_a_weight_of_many_chunks_is_the_same_as_row_by_row(monkeypatch: pytest.MonkeyPatch, zero_points: bool) -> None:
    weight = draw(10, 40)
    whole = by_search(weight, 4, 16, zero_points)
    monkeypatch.setattr("dense2moe.export.quantization.blockwise._CHUNK_ELEMENTS", 3 * 48)
    chunked = by_search(weight, 4, 16, zero_points)
    for found in (chunked, join([by_search(weight[n : n + 1], 4, 16, zero_points) for n in range(10)])):
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.scales, whole.scales)
        assert torch.equal(read_zero_points(found, 4), read_zero_points(whole, 4))


def test_num_blocks_counts_the_padded_one() -> None:
    assert [num_blocks(width, 16) for width in (1, 15, 16, 17, 32)] == [1, 1, 1, 2, 2]
