"""Routers at the start: pure tensor functions."""

from __future__ import annotations

import torch


def draw_router(num_experts: int, norm_weight: torch.Tensor, logit_std: float, generator: torch.Generator) -> torch.Tensor:
    """Draw router rows whose logits have the standard deviation `logit_std`; returns [num_experts, hidden] in the dtype of `norm_weight`.

    The router reads the output of an RMS norm with scale `norm_weight` [hidden]: a vector with unit mean square, times the scale. Its squared length
    is on average the squared length of the scale, so rows of N(0, s) give logits of N(0, s * |norm_weight|), and s = logit_std / |norm_weight|.
    Rows of N(0, 1) at hidden 4096 would give logits with deviation 64, that is a router that has made up its mind.
    """
    hidden = norm_weight.numel()
    if logit_std == 0:
        return torch.zeros(num_experts, hidden, dtype=norm_weight.dtype)
    length = float(torch.linalg.vector_norm(norm_weight.to(torch.float32)))
    rows = torch.empty(num_experts, hidden).normal_(generator=generator)
    return rows.mul_(logit_std / max(length, 1e-12)).to(norm_weight.dtype)
