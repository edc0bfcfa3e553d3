"""GPTQ chooses the integers that the formulas of its paper choose.

And does no worse than rounding where it has nothing to go by.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dense2moe.export.quantization.blockwise import Quantized, dequantize, quantize, round_to_nearest
from dense2moe.export.quantization.gptq import prepare_moments, quantize_together
from dense2moe.export.quantization.gptq import quantize_gptq as quantize_prepared

BITS = (4, 8)
ZERO_POINTS = pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])


def draw(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width, generator=generator).add(0.1)
    return torch.randn(rows, width, generator=generator) / width**0.5, inputs


def quantize_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, block_size: int, zero_points: bool = False, passes: int = 3
) -> Quantized:
    return quantize_prepared(
        weight, prepare_moments(hessian, block_size), bits, block_size, zero_points=zero_points, passes=passes
    )


def loss(weight: torch.Tensor, inputs: torch.Tensor, found: torch.Tensor) -> float:
    return float((inputs.double() @ (weight - found).double().T).square().sum())


def reference(weight: np.ndarray, hessian: np.ndarray, quantized: Quantized, bits: int, block_size: int) -> np.ndarray:
    """A column at a time, in float64.

    By the inverse of what is left of the damped H, inverted anew for each column (GPTQ, equation 2).
    """
    w, width = weight.astype(np.float64).copy(), weight.shape[1]
    h = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(width)
    scales = quantized.scales.numpy().astype(np.float64)
    zeros = np.full_like(scales, 2 ** (bits - 1))
    if quantized.zero_points is not None:
        packed = quantized.zero_points.numpy()
        zeros = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    result = np.empty_like(w)
    for column in range(width):
        inverse = np.linalg.inv(h[column:, column:])
        scale, zero = scales[:, column // block_size], zeros[:, column // block_size].astype(np.float64)
        result[:, column] = (np.clip(np.rint(w[:, column] / scale) + zero, 0, 2**bits - 1) - zero) * scale
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
    return result


@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("width", "block_size"), [(32, 16), (40, 16), (160, 32), (144, 128)])
def test_integers_are_those_of_the_formula_with_the_inverse_taken_anew(
    width: int, block_size: int, bits: int, zero_points: bool
) -> None:
    weight, inputs = draw(8, width, 1000)
    hessian = inputs.T @ inputs
    quantized = quantize_gptq(weight, hessian, bits, block_size, zero_points, passes=0)
    expected = reference(weight.numpy(), hessian.double().numpy(), quantized, bits, block_size)
    found = dequantize(quantized, width, bits).double().numpy()
    # Float32 sums decide a weight that lies in the middle between two integers; all others are equal.
    same = np.abs(found - expected) < 1e-6
    assert same.mean() > 0.995
    assert loss(weight, inputs, torch.from_numpy(found)) == pytest.approx(
        loss(weight, inputs, torch.from_numpy(expected)), rel=0.02
    )


@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_the_loss_on_dependent_inputs_is_well_below_that_of_rounding(
    block_size: int, bits: int, zero_points: bool
) -> None:
    weight, inputs = draw(64, 128, 2000)
    hessian, importance = inputs.T @ inputs, inputs.square().mean(0)
    plain, searched, weighed, gptq = (
        loss(weight, inputs, dequantize(found, 128, bits))
        for found in (
            round_to_nearest(weight, bits, block_size, zero_points=zero_points),
            quantize(weight, bits, block_size, zero_points=zero_points),
            quantize(weight, bits, block_size, importance, zero_points=zero_points),
            quantize_gptq(weight, hessian, bits, block_size, zero_points=zero_points),
        )
    )
    assert gptq < 0.6 * plain
    assert gptq < 0.7 * weighed
    assert weighed < searched < plain


@ZERO_POINTS
@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize("bits", BITS)
def test_descent_lowers_the_loss_until_no_integer_can_be_better_by_itself(
    bits: int, width: int, zero_points: bool
) -> None:
    weight, inputs = draw(8, width, 1000)
    hessian = inputs.T @ inputs
    damped = hessian.double().numpy() + 0.01 * hessian.double().diagonal().mean().item() * np.eye(width)

    def damped_loss(found: np.ndarray) -> np.ndarray:
        error = weight.double().numpy() - found
        return np.einsum("nk,kl,nl->n", error, damped, error)

    losses = []
    for passes in (0, 1, 3, 60):
        quantized = quantize_gptq(weight, hessian, bits, 16, zero_points, passes)
        losses.append(damped_loss(dequantize(quantized, width, bits).double().numpy()))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[2].sum() < 0.97 * losses[0].sum()
    found = dequantize(quantized, width, bits).double().numpy()
    steps = quantized.scales.double().numpy().repeat(16, axis=1)[:, :width]
    codes = np.rint(found / steps)
    lowest = -(2.0 ** (bits - 1)) * np.ones((8, 1))
    if zero_points:
        packed = quantized.own_zero_points().numpy()
        points = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(8, -1)
        lowest = -points[:, : quantized.scales.shape[1]].astype(float).repeat(16, axis=1)[:, :width]
    lowest = np.broadcast_to(lowest, codes.shape)
    for column in range(width):
        for change in (-1, 1):
            other = found.copy()
            changed = codes[:, column] + change
            inside = (changed >= lowest[:, column]) & (changed < lowest[:, column] + 2**bits)
            other[:, column] += np.where(inside, change, 0) * steps[:, column]
            assert (damped_loss(other) >= losses[-1] * (1 - 1e-5)).all()


@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_inputs_that_are_independent_leave_nothing_to_make_up_for(bits: int, zero_points: bool) -> None:
    weight, _ = draw(8, 64, 1)
    found = quantize_gptq(weight, torch.eye(64), bits, 32, zero_points, passes=0)
    expected = quantize(weight, bits, 32, zero_points=zero_points)
    assert not zero_points or torch.equal(found.own_zero_points(), expected.own_zero_points())
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.scales, expected.scales)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_that_are_always_zero_have_their_columns_rounded(bits: int) -> None:
    weight, inputs = draw(8, 64, 500)
    inputs[:, 10:20] = 0
    quantized = quantize_gptq(weight, inputs.T @ inputs, bits, 16)
    found = dequantize(quantized, 64, bits)
    assert torch.isfinite(found).all()
    step = quantized.scales.abs().repeat_interleave(16, dim=1)
    half = (found - weight).abs() <= 0.5001 * step
    cut = found.abs() >= (2 ** (bits - 1) - 1) * step * 0.9999  # at the end of the range
    assert (half | cut)[:, 10:16].all(), "nothing moved them"


@ZERO_POINTS
@pytest.mark.parametrize("bits", BITS)
def test_no_input_at_all_is_searched_rounding(bits: int, zero_points: bool) -> None:
    weight, _ = draw(8, 64, 1)
    found = quantize_gptq(weight, torch.zeros(64, 64), bits, 32, zero_points, passes=0)
    expected = quantize(weight, bits, 32, zero_points=zero_points)
    assert torch.equal(found.codes, expected.codes)
    errors = [
        (weight - dequantize(q, 64, bits)).norm()
        for q in (quantize_gptq(weight, torch.zeros(64, 64), bits, 32, zero_points), expected)
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_fewer_tokens_than_inputs_are_still_solved(bits: int) -> None:
    weight, inputs = draw(8, 64, 3)
    assert torch.isfinite(dequantize(quantize_gptq(weight, inputs.T @ inputs, bits, 32), 64, bits)).all()


@ZERO_POINTS
def test_a_row_of_zeros_and_a_row_of_equal_weights_stay_what_they_are(zero_points: bool) -> None:
    weight, inputs = draw(3, 32, 500)
    weight[0], weight[1] = 0, 0.25
    found = dequantize(quantize_gptq(weight, inputs.T @ inputs, 4, 16, zero_points=zero_points), 32, 4)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], weight[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight, inputs = draw(4, 32, 100)
    hessian = inputs.T @ inputs
    with pytest.raises(ValueError, match=r"^weight \(4, 32\) must be finite, and 32 wide as its moments$"):
        quantize_gptq(weight.index_fill(1, torch.tensor([3]), value), hessian, 4, 16)
    with pytest.raises(ValueError, match=r"^moments \(32, 32\) must be square and finite$"):
        quantize_gptq(weight, hessian.index_fill(1, torch.tensor([3]), value), 4, 16)


def test_moments_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight \(4, 32\) must be .* 16 wide"):
        quantize_gptq(torch.ones(4, 32), torch.eye(16), 4, 16)


@pytest.mark.parametrize("bits", BITS)
def test_importance_moves_the_error_to_where_it_counts_little(bits: int) -> None:
    weight, _ = draw(64, 32, 1)
    importance = torch.ones(32)
    importance[:4] = 100.0
    plain, weighed = (dequantize(quantize(weight, bits, 32, weighing), 32, bits) for weighing in (None, importance))
    errors = [(weight - found).square().mean(0) for found in (plain, weighed)]
    assert (errors[1] * importance).sum() < (errors[0] * importance).sum()
    assert errors[0].sum() < errors[1].sum()


def test_importances_that_are_all_zero_count_alike() -> None:
    weight, _ = draw(8, 32, 1)
    assert torch.equal(quantize(weight, 4, 16, torch.zeros(32)).codes, quantize(weight, 4, 16).codes)


@pytest.mark.parametrize("lanes", [4, 8, 20, 8192])
def test_matrices_quantized_side_by_side_are_those_quantized_alone(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, and so parts of a matrix or matrices, are taken at a time."""
    drawn = [draw(8, 160, 500, seed) for seed in range(3)]
    moments = [prepare_moments(inputs.T @ inputs, 32) for _, inputs in drawn]
    alone = [quantize_prepared(weight, own, 4, 32) for (weight, _), own in zip(drawn, moments, strict=True)]
    monkeypatch.setattr("dense2moe.export.quantization.gptq._LANES", lanes)
    together = quantize_together([weight for weight, _ in drawn], moments, 4, 32)
    assert len(together) == 3
    for (weight, inputs), found, expected in zip(drawn, together, alone, strict=True):
        values = [dequantize(quantized, 160, 4) for quantized in (found, expected)]
        assert (found.codes == expected.codes).float().mean() > 0.999  # sums of another shape may be rounded otherwise
        assert loss(weight, inputs, values[0]) == pytest.approx(loss(weight, inputs, values[1]), rel=1e-3)
