"""The precision of training: as set, or chosen by the device."""

from __future__ import annotations

from typing import Literal

import torch

from dense2moe.upcycle.models.table import find_host


def choose_precision(setting: Literal["auto", "float32", "bfloat16"], model_type: str) -> str:
    """The precision of training.

    Unless it is set, bfloat16 where the device computes in it natively, and the model does.
    """
    if setting != "auto":
        return setting
    if (host := find_host(model_type)) is not None and not host.trains_in_half:
        return "float32"
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
