"""Parts of a loss: noted when computed, told as means."""

from __future__ import annotations

import torch

from dense2moe.upcycle.training.processes import mean_over_processes


class LossParts:
    """Every part of the loss since it was last told, by its name in the history."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}

    def note(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Remember a part's value; returns it."""
        self._values.setdefault(name, []).append(value.detach().float())
        return value

    def take(self) -> dict[str, float]:
        """The mean of every part since the last call, over all processes, which must all ask for it."""
        values, self._values = self._values, {}
        return {name: float(mean_over_processes(torch.stack(parts).mean())) for name, parts in values.items()}
