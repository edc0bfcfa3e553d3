"""Attention of transformers, traced as one node of our domain.

Models ask a table of transformers for the function that computes attention. While an encoder is traced, the entry of
torch's scaled dot product answers with a marker,

    Attention(q [B, h, S, d], k [B, h, T, d], v [B, h, T, e], mask?) → [B, S, h, e]

which `passes.attention` replaces. The mask is boolean, [B or 1, h or 1, S, T].

Left to torch: fewer heads of keys than of queries, causal attention without a mask, masks of numbers or of another
shape, and models that compute attention themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dense2moe.export.tracing.marking import DOMAIN

_SDPA = "sdpa"


@contextmanager
def mark_attention(is_wanted: bool) -> Iterator[None]:
    """Let attention answer with markers, where that is wanted."""
    if not is_wanted:
        yield
        return
    plain: Any = ALL_ATTENTION_FUNCTIONS[_SDPA]

    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **given: Any
    ) -> Any:
        is_causal = given["is_causal"] if given.get("is_causal") is not None else getattr(module, "is_causal", True)
        if (attention_mask is None and is_causal) or not _is_expressible(query, key, attention_mask, given):
            return plain(module, query, key, value, attention_mask, **given)
        scale = given.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        inputs = [query, key, value, *([] if attention_mask is None else [attention_mask])]
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        attended = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=shape, version=1
        )
        return attended, None

    ALL_ATTENTION_FUNCTIONS[_SDPA] = forward
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_SDPA]


def _is_expressible(query: torch.Tensor, key: torch.Tensor, mask: Any, given: dict[str, Any]) -> bool:
    if query.shape[1] != key.shape[1] or any(given.get(name) is not None for name in ("position_bias", "cache")):
        return False
    if mask is None:
        return True
    has_shape = mask.dim() == 4 and guard_or_false(mask.shape[2] == query.shape[2])
    return mask.dtype == torch.bool and has_shape and bool(guard_or_false(mask.shape[3] == key.shape[2]))
