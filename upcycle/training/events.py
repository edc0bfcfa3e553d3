"""TensorBoard's events, written from a history."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dense2moe.upcycle.training.history import Step


def write_events(directory: Path, history: Iterable[Step]) -> None:
    """Write TensorBoard's events: losses, learning rate, and figures per layer.

    Of a layer: the largest and the smallest load, entropy, margin and cosine.
    """
    from tensorboardX import SummaryWriter  # an extra of its own

    with SummaryWriter(str(directory)) as writer:
        for step in history:
            _write_event(step, writer)


def _write_event(step: Step, writer: Any) -> None:
    scalars = {name: value for name, value in asdict(step).items() if isinstance(value, float)}
    for layer in step.layers:
        found = {"largest load": max(layer.load), "smallest load": min(layer.load), **asdict(layer)}
        scalars |= {f"layer {layer.number}/{name}": value for name, value in found.items() if isinstance(value, float)}
    for name, value in scalars.items():
        writer.add_scalar(name.replace(" ", "_"), value, step.step)
