"""Products with a matrix that may be narrower than what it multiplies."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

_CAST_ELEMENTS = 1 << 24  # of a matrix that are cast at once: 64 MB in float32


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in x's dtype, or in autocast's.

    x is [..., in], weight [out, in].

    The weight may be narrower than x.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    return cast(torch.Tensor, cast(Any, _Product).apply(x, weight))


class _Product(torch.autograd.Function):
    """A product that keeps only its narrow matrix for the backward pass.

    Where the matrix learns, the input is kept too. The matrix's gradient is rounded to its own dtype, some rows at a
    time, as autograd rounds that of a matrix that was cast.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        parts = _parts(weight)
        if len(parts) == 1:
            return F.linear(x, weight.to(dtype))
        found = x.new_empty(*x.shape[:-1], len(weight))
        for rows in parts:
            found[..., rows] = F.linear(x, weight[rows].to(dtype))
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, x = ctx.saved_tensors
        first, *others = _parts(weight)
        found = gradient[..., first] @ weight[first].to(gradient.dtype)
        for rows in others:
            found += gradient[..., rows] @ weight[rows].to(gradient.dtype)
        if x is None:
            return found, None
        learned, read = torch.empty_like(weight), x.flatten(0, -2)
        for rows in (first, *others):
            learned[rows] = gradient[..., rows].flatten(0, -2).T @ read
        return found, learned


def _parts(weight: torch.Tensor) -> list[slice]:
    """A matrix's rows, as many at once as may be cast."""
    step = max(1, _CAST_ELEMENTS // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, max(1, len(weight)), step)]
