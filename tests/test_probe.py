"""The rounding of each kind of product on this processor is found by products.

And one that is not known is told as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dense2moe.export.parity.inside import probe
from dense2moe.export.parity.inside.probe import find_group
from dense2moe.export.parity.weights.matrix import Operator
from dense2moe.export.quantization.blockwise import dequantize, quantize
from dense2moe.export.quantization.input_scaling import round_inputs
from dense2moe.export.runtime.decoder import CPU

BLOCK = 32
MATMUL = Operator("MatMulNBits", 4, BLOCK, rounds_inputs=True)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test finds is not known to the next."""
    probe._find.cache_clear()
    yield
    probe._find.cache_clear()


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_the_group_that_is_found_explains_other_numbers_too(bits: int, block_size: int, zero_points: bool) -> None:
    """Of another width and height, to a float32 sum's noise; and without rounding they are not explained."""
    operator = Operator("MatMulNBits", bits, block_size, rounds_inputs=True, zero_points=zero_points)
    group = find_group(operator, CPU)
    assert group is not None
    generator, width, height = torch.Generator().manual_seed(7), 3 * block_size, 24
    weight = quantize(torch.randn(height, width, generator=generator), bits, block_size, zero_points=zero_points)
    x = torch.randn(5, width, generator=generator)
    found = probe._run(probe._product(operator, weight, width, height), {"x": x.numpy()}, CPU).double()
    matrix = dequantize(weight, width, bits).double()
    rounded = (round_inputs(x, group) if group else x).double() @ matrix.T
    assert float((found - rounded).norm() / rounded.norm()) < 1e-6
    if group:
        assert float((found - x.double() @ matrix.T).norm() / rounded.norm()) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_the_group_of_fused_experts_is_found(bits: int) -> None:
    """The same in both of an expert's products; in 8 bits the kernel rounds whatever it is told."""
    operator = Operator("QMoE", bits, BLOCK, rounds_inputs=True, zero_points=bits == 4)
    group = find_group(operator, CPU)
    assert group is not None
    generator, width = torch.Generator().manual_seed(7), 3 * BLOCK
    first, last = (
        quantize(torch.randn(rows, width, generator=generator), bits, BLOCK, zero_points=bits == 4)
        for rows in (2 * width, width)
    )
    x = torch.randn(5, width, generator=generator)
    feeds = {"x": x.numpy(), "logits": np.zeros((5, 1), np.float32)}
    found = probe._run(probe._experts(operator, first, last, width), feeds, CPU).double()

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return (round_inputs(value.float(), group) if group else value).double()

    up = rounded(x) @ dequantize(first, width, bits).double().T
    expected = rounded(torch.nn.functional.silu(up[:, 0::2]) * up[:, 1::2]) @ dequantize(last, width, bits).double().T
    # A number between two steps may be rounded to either, which is a step of one input in a token here and there.
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 2e-5


def test_a_product_that_is_told_to_round_nothing_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_run", lambda *_: pytest.fail("it was"))
    assert find_group(Operator("MatMulNBits", 4, BLOCK), CPU) == 0
    assert find_group(Operator("MatMul"), CPU) == 0


def test_a_kernel_that_rounds_nothing_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accuracy_level` is a permission."""
    monkeypatch.setattr(probe, "_run", lambda model, feeds, provider: exact(feeds))
    assert find_group(MATMUL, CPU) == 0


def exact(feeds: dict[str, np.ndarray]) -> torch.Tensor:
    """What the probe's product is with exact inputs: its weights are drawn as its inputs are, and after them."""
    x = torch.from_numpy(feeds["x"])
    generator = torch.Generator().manual_seed(BLOCK)
    torch.randn(*x.shape, generator=generator)
    weight = quantize(torch.randn(16, x.shape[1], generator=generator), 4, BLOCK)
    return (x.double() @ dequantize(weight, x.shape[1], 4).double().T).float()


@pytest.mark.parametrize("change", [lambda y: y * 1.001, lambda y: y + 0.01 * y.roll(1, -1), lambda y: y * torch.nan])
def test_a_rounding_that_nobody_knows_is_none(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    run = probe._run
    monkeypatch.setattr(probe, "_run", lambda *arguments: change(run(*arguments)))
    assert find_group(MATMUL, CPU) is None


def test_kernels_that_differ_between_one_row_and_many_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    group, run = find_group(MATMUL, CPU), probe._run
    probe._find.cache_clear()
    monkeypatch.setattr(
        probe,
        "_run",
        lambda model, feeds, provider: exact(feeds) if len(feeds["x"]) > 1 else run(model, feeds, provider),
    )
    assert find_group(MATMUL, CPU) == (None if group else 0)


def test_what_this_onnxruntime_refuses_is_not_known() -> None:
    assert find_group(Operator("MatMulNBits", 4, 24, rounds_inputs=True), CPU) is None  # blocks are powers of two
