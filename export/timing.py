"""Which lowering is the fastest here: the candidates timed side by side on this machine.

No lowering wins everywhere: it depends on the runtime, the processor, the widths, the number of experts and the bits. What is timed is the model
itself, cut to so many layers that their weights do not stay in the processor's caches, since that is what decoding waits for. A traced model is timed
whole.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.config import OnnxConfig
from export.decoder import DecoderGraph
from export.lowering import Lowering
from export.progress import Progress
from export.runtime import Decoder
from export.speed import Speed, measure_speeds
from export.storage import save_graph
from export.twin import Twin

_TIMED_WEIGHTS = 1 << 28
"""Layers are taken until they hold as many weights, or all of them: at 4 bits 130 MB, more than most processors can keep."""


@dataclass(frozen=True)
class LoweringTime:
    """A candidate and its speed: tokens per second of prefill and decode at batch 1, and seconds of the request that the recipe describes."""

    lowering: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    request_seconds: float


def time_lowerings(
    twin: Twin, config: OnnxConfig, candidates: Sequence[Lowering], build: Callable[[Lowering], DecoderGraph], folder: Path, progress: Progress
) -> list[LoweringTime]:
    """Time the graph that `build` makes with every candidate, the fastest first; files that this needs lie in `folder` and are gone afterwards."""
    c = twin.checkpoint.config
    prompt = np.random.default_rng(0).integers(0, c.vocab_size, config.request.prompt_tokens)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        decoders = {}
        for number, lowering in enumerate(candidates):
            progress("timing lowerings", number, len(candidates) + 1)
            directory = Path(scratch) / lowering.name
            directory.mkdir()
            save_graph(build(lowering).model, directory, lambda *_: None)
            c.save_pretrained(directory)
            decoders[lowering.name] = Decoder(directory)
        progress("timing lowerings", len(candidates), len(candidates) + 1)
        speeds = measure_speeds(decoders, prompt.tolist(), config.request.new_tokens)
        progress("timing lowerings", len(candidates) + 1, len(candidates) + 1)
    times = [_time(name, speed, config) for name, speed in speeds.items()]
    return sorted(times, key=lambda found: found.request_seconds)


def count_timed_layers(twin: Twin) -> int:
    """How many of the first layers are timed, one with experts among them."""
    sizes: dict[int, int] = {}
    for name, entry in twin.checkpoint.entries.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + math.prod(entry.shape)
    total = 0
    for layer in sorted(sizes):
        total += sizes[layer]
        if total >= _TIMED_WEIGHTS and any(twin.family.router.format(layer=n) in twin.checkpoint.entries for n in range(layer + 1)):
            return layer + 1
    return len(sizes)


def _time(name: str, speed: Speed, config: OnnxConfig) -> LoweringTime:
    return LoweringTime(name, speed.prefill, speed.decode, speed.request_seconds(config.request.prompt_tokens, config.request.new_tokens))
