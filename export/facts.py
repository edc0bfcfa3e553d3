"""What an ONNX package holds, and how its lowering was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dense2moe.export.variant import Device, ElementType


@dataclass(frozen=True)
class LoweringTime:
    """A candidate and its speed.

    Tokens per second of prefill and decode (None: nothing decodes) at batch 1, and seconds of the request that the
    recipe describes.
    """

    lowering: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    request_seconds: float


LoweringChoice = Literal["only", "timed", "first, as no such device was there to time on"]


@dataclass(frozen=True)
class OnnxFacts:
    """What was written, and how its lowering was chosen.

    The lowering is "none" where no layer has experts. Elsewhere the lowering is the only possible one, or the
    fastest of those that were timed here (`timings`, the fastest first), or, without a device of the kind to time on,
    the first possible one.
    """

    device: Device
    element_type: ElementType
    lowering: str
    choice: LoweringChoice
    timings: tuple[LoweringTime, ...]
    min_onnxruntime: str
    num_nodes: int
    package_bytes: int
