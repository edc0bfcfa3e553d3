"""The precision of training: as set, or chosen by the device."""

from __future__ import annotations

from typing import Literal

import torch


def choose_precision(setting: Literal["auto", "float32", "bfloat16"]) -> str:
    """The precision of training.

    bfloat16 where the device computes in it natively, unless it is set.
    """
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
