"""The experts' forward pass for training: tokens sorted by expert.

What transformers' `eager` does for each expert in turn (find its tokens, gather them, scatter what they give) is done here once for all: the tokens
are sorted by expert and gathered, each expert multiplies its own rows, and one sum brings them back. And its `gate_up_proj[expert]` costs, in the
backward pass, a tensor of zeros as large as all experts together for every expert; `unbind` costs one for all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "dense2moe_sorted"


def sorted_experts_forward(experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """What the experts give, [T, H], for hidden states [T, H] and the index and weight of each token's experts, both [T, k].

    For gated experts without biases whose weights lie [E, 2I, H] and [E, H, I], as those of every target of ours do.
    """
    assert experts.has_gate
    assert not any((experts.has_bias, experts.is_transposed, experts.has_post_expert_norm))
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=experts.num_experts).tolist()
    tokens = order // top_k_index.shape[1]
    parts = hidden.index_select(0, tokens).split(counts)
    weights = zip(experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True)
    given = [F.linear(experts._apply_gate(F.linear(part, up)), down) for part, (up, down) in zip(parts, weights, strict=True) if len(part)]
    weighted = torch.cat(given) * top_k_weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(hidden).index_add(0, tokens, weighted.to(hidden.dtype))


def use_sorted_experts(model: Any) -> None:
    """Make the experts of a model of transformers compute by `sorted_experts_forward`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    model.set_experts_implementation(NAME)
