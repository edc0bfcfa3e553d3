"""Products with narrow matrices.

Values and gradients are those of the matrix that was cast, whether it is taken in parts or not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense2moe.upcycle.checkpoints.products import product


@pytest.mark.parametrize("elements", [1 << 24, 40, 1])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_a_narrow_matrix_computes_and_learns_as_its_cast_does(
    elements: int, learns: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.products._CAST_ELEMENTS", elements)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, requires_grad=True)
    weight = torch.randn(11, 8, generator=draw).bfloat16().requires_grad_(learns)
    outward = torch.randn(*shape[:-1], 11, generator=draw)
    leaves = (x, weight) if learns else (x,)
    found, expected = product(x, weight), F.linear(x, weight.float())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad((values * outward).sum(), leaves) for values in (found, expected))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    if learns:
        assert ours[1].dtype == torch.bfloat16
        # a sum in another order may be rounded the other way
        torch.testing.assert_close(ours[1].float(), theirs[1].float(), rtol=2**-7, atol=1e-5)


def test_a_matrix_that_learns_is_not_cast_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.products._CAST_ELEMENTS", 16)
    sizes: list[int] = []
    x, weight = torch.ones(1, 8, requires_grad=True), torch.ones(64, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.nbytes) or kept, lambda kept: kept):
        product(x, weight).sum().backward()
    assert max(sizes) == weight.nbytes
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))
