"""The task of one quantization method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.models.architecture import Architecture


@dataclass(frozen=True)
class Assignment:
    """A checkpoint, its tensors' bits, settings, and calibration text.

    Bits are by name; 16 and 32 are left alone. `family` is None where no record describes the model, which then cannot
    be walked layer by layer. Scales are rounded to `scale_type`. `blocks` are token ids [N, S].
    """

    checkpoint: Checkpoint
    family: Architecture | None
    plan: Mapping[str, int]
    config: QuantizeConfig
    scale_type: torch.dtype
    blocks: torch.Tensor | None
