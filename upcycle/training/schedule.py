"""The learning rate's schedule: a share of its peak at each step."""

from __future__ import annotations

import math

_LEAST_SHARE = 0.1  # the cosine ends here, as in Llama's and OLMoE's recipes


def schedule_share(schedule: str, warmup_steps: int, total_steps: int, step: int) -> float:
    """Share of the peak learning rate at a step counted from 0.

    'inverse-sqrt' falls from the peak as the root of the steps since it (Vaswani et al. 2017, section 5.3, its warm-up
    being at least one step).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        offset = max(1, warmup_steps)
        return math.sqrt(offset / (offset + step - warmup_steps))
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return _LEAST_SHARE + (1 - _LEAST_SHARE) * falling
