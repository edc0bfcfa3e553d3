"""Labels and values of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dense2moe.export.runtime.predictions import Scored
from dense2moe.upcycle.tasks.head import SEVERAL, VALUE

Said = dict[str, Any]
"""Fields of a `Prediction`."""


def read_labels(logits: torch.Tensor, labels: Sequence[str], kind: str | None) -> Said:
    """What logits [labels] of a text or an image say.

    Labels by probability; where several may hold, those above one half; or a value.
    """
    return _KINDS.get(kind, _rank)(logits, labels)


def _rank(logits: torch.Tensor, labels: Sequence[str]) -> Said:
    return {"labels": _name(logits.softmax(-1), labels)}


def _choose(logits: torch.Tensor, labels: Sequence[str]) -> Said:
    return {"labels": tuple(each for each in _name(logits.sigmoid(), labels) if each.score > 0.5)}


def _measure(logits: torch.Tensor, _: Sequence[str]) -> Said:
    return {"value": float(logits[0])}


_KINDS: Mapping[str | None, Callable[[torch.Tensor, Sequence[str]], Said]] = {SEVERAL: _choose, VALUE: _measure}


def _name(scores: torch.Tensor, labels: Sequence[str]) -> tuple[Scored, ...]:
    """Labels with their scores, the highest first."""
    return tuple(Scored(labels[number], float(scores[number])) for number in scores.argsort(descending=True).tolist())
