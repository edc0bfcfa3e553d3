"""The experts' forward pass for training: tokens sorted by expert.

What transformers' `eager` does for each expert in turn (find its tokens, gather them, scatter what they give) is done
here once for all: the tokens are sorted by expert and gathered, each expert multiplies its own rows, and one sum brings
them back. Where a product is compiled for its number of rows, that number is rounded up: an expert's first token fills
the rest, and what is made of it there is dropped. And transformers' `gate_up_proj[expert]` costs, in the backward pass,
a tensor of zeros as large as all experts together for every expert; `unbind` costs one for all.

Of an expert's inner values, the largest of a layer, the least is kept for the backward pass: what its first product
gives where its weights learn, and only what it reads where they are frozen, which then costs that product once more in
place of the gradients of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dense2moe.upcycle.checkpoints.products import product

NAME = "dense2moe_sorted"
_ROWS = 32
"""Where oneDNN compiles code for each number of rows, an expert computes a multiple of these."""
_RECOMPUTES = "dense2moe_recomputes"
LOW_RANK = "dense2moe_low_rank"
"""An attribute of experts.

By the name of a stack of matrices, what gives the factors of their updates and the scale; where they are not merged.
"""


def sorted_experts_forward(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output of the experts, [T, H], for hidden states [T, H].

    Index and weights of each token's experts are [T, k]; an expert of weight 0 is not visited. For experts whose
    weights lie [E, 2I, H], or [E, I, H] without a gate, and [E, H, I], as those of every target of ours do.
    """
    assert not any((experts.is_transposed, experts.has_post_expert_norm))
    flat, visited = top_k_index.flatten(), top_k_weights.flatten() != 0
    order = flat.argsort(stable=True)
    if not visited.all():
        order, flat = order[visited[order]], flat[visited]
    counts = flat.bincount(minlength=experts.num_experts).tolist()
    tokens = order // top_k_index.shape[1]
    if _uses_onednn(hidden):
        filled = [torch.cat([own, own[:1].expand(-len(own) % _ROWS)]) for own in tokens.split(counts)]
        parts = hidden.index_select(0, torch.cat(filled)).split([len(own) for own in filled])
    else:
        parts = hidden.index_select(0, tokens).split(counts)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    weights = zip(_matrices(experts, first), _matrices(experts, "down_proj"), strict=True)
    given = [
        _run_expert(experts, part, up, down)[:count]
        for part, count, (up, down) in zip(parts, counts, weights, strict=True)
        if count
    ]
    weighted = torch.cat(given) * top_k_weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(hidden).index_add(0, tokens, weighted.to(hidden.dtype))


def _uses_onednn(hidden: torch.Tensor) -> bool:
    """Whether experts multiply in bfloat16 on the CPU.

    OneDNN does that, and compiles code for each number of rows that it has not met.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    return hidden.device.type == "cpu" and dtype == torch.bfloat16


@dataclass(frozen=True)
class _Matrix:
    """An expert's matrix [out, in], its low-rank update, and its bias.

    Factors [rank, in] and [out, rank], float32, and the scale of their product.
    """

    weight: torch.Tensor
    update: tuple[torch.Tensor, torch.Tensor, float] | None = None
    bias: torch.Tensor | None = None

    @property
    def learns(self) -> bool:
        return self.weight.requires_grad

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = product(x, self.weight)
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        if self.update is None:
            return found
        first, second, scale = self.update
        return found + F.linear(F.linear(x, first), second).to(found.dtype) * scale


def _matrices(experts: Any, name: str) -> list[_Matrix]:
    weights = getattr(experts, name).unbind(0)
    biases = getattr(experts, f"{name}_bias").unbind(0) if experts.has_bias else (None,) * len(weights)
    factors = getattr(experts, LOW_RANK, {}).get(name)
    if factors is None:
        return [_Matrix(weight, bias=bias) for weight, bias in zip(weights, biases, strict=True)]
    first, second, scale = factors()
    pieces = zip(weights, first, second, biases, strict=True)
    return [_Matrix(weight, (a, b, scale), bias) for weight, a, b, bias in pieces]


def _run_expert(experts: Any, part: torch.Tensor, up: _Matrix, down: _Matrix) -> torch.Tensor:
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    if not torch.is_grad_enabled() or not getattr(experts, _RECOMPUTES, True):
        return down(activate(up(part)))
    if up.learns or down.learns:
        return cast(torch.Tensor, checkpoint(lambda inner: down(activate(inner)), up(part), use_reentrant=False))
    return down(cast(torch.Tensor, checkpoint(lambda x: activate(up(x)), part, use_reentrant=False)))


def use_sorted_experts(model: Any, recomputes: bool = True) -> None:
    """Make the experts of a model of transformers compute by `sorted_experts_forward`.

    Without `recomputes` they keep their inner values, as is best where whole layers are computed twice.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    model.set_experts_implementation(NAME)
    for module in model.modules():
        if hasattr(module, "is_transposed"):  # experts, as transformers marks them
            setattr(module, _RECOMPUTES, recomputes)
