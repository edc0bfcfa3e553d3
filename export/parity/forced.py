"""The twin with the fine-tuned model's routing."""

from __future__ import annotations

from typing import Any

import torch

from dense2moe.export.parity.agreement import Comparison, mean_divergence
from dense2moe.export.parity.forward import Reference
from dense2moe.export.parity.records import Forced


def force_routing(twin: Reference, blocks: torch.Tensor, tuned: Comparison | None) -> Forced | str:
    """The twin with the fine-tuned model's routing.

    What error is left comes from the weights alone.
    """
    if tuned is None:
        return "not run: one checkpoint is both references"
    if not tuned.routers:
        return "not run: no layer has experts"
    assert tuned.first is not None
    ids = blocks[:1]
    mask = torch.ones_like(ids)
    routers = {n: _first_tokens(said, ids.numel()) for n, said in tuned.routers.items()}
    free = twin.forward(ids, mask).logits
    with twin.forced(routers):
        forced = twin.forward(ids, mask).logits
    kl, kl_free = (max(mean_divergence(tuned.first[:1], logits), 0.0) for logits in (forced, free))
    return Forced(kl, kl_free, ids.numel())


def _first_tokens(said: Any, count: int) -> Any:
    """A router's output for the first tokens of a batch."""
    return tuple(part[:count] for part in said) if isinstance(said, tuple) else said[:count]
