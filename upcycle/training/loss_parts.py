"""Parts of a loss: noted when computed, told as means."""

from __future__ import annotations

import torch

from dense2moe.upcycle.training.processes import mean_over_processes


class LossParts:
    """Every part of the loss since the last report, by name."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}

    def note(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Remember a part's value; returns it."""
        self._values.setdefault(name, []).append(value.detach().float())
        return value

    def take(self) -> dict[str, float]:
        """Every part's mean since the last call, over all processes.

        Every process must call it.
        """
        values, self._values = self._values, {}
        return {name: float(mean_over_processes(torch.stack(parts).mean())) for name, parts in values.items()}
