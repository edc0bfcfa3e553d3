"""Timing of lowerings: the candidates side by side on this machine.

No lowering wins everywhere: it depends on the runtime, the processor, the widths, the number of experts and the bits.
What is timed is the model itself, cut to its first layer with experts, or to a few where their weights are few; layers
are alike, and a model's time is that of its layers. A traced model is timed whole. The candidates take turns, and each
is loaded for its turn alone: one at a time is in memory.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dense2moe.export.facts import LoweringTime
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.decoder import Cut, DecoderGraph
from dense2moe.export.lowering import Lowering
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import PROVIDERS, Decoder
from dense2moe.export.runtime.speed import Speed, measure_speed
from dense2moe.export.storage import save_graph, save_package_config
from dense2moe.upcycle.models.parts import layer_of
from dense2moe.upcycle.progress import Progress

_TIMED_BYTES = 16 << 20
"""Layers are taken until their weights have as many bytes, or all of them.

More than a core's own cache keeps, and one layer of most models.
"""
_TIMED_VOCABULARY = 4096
"""Rows of embedding and head; they are the same for all candidates."""
_NUM_ROUNDS = 3
_MOST_NEW_TOKENS = 32
"""Decode steps that are timed; a request's others take as long."""


def time_lowerings(
    twin: Twin,
    config: OnnxConfig,
    candidates: Sequence[Lowering],
    build: Callable[[Lowering], Mapping[str, DecoderGraph]],
    folder: Path,
    progress: Progress,
    measure: Callable[[Path], Speed] | None = None,
) -> list[LoweringTime]:
    """Time the graphs that `build` makes with every candidate, the fastest first.

    Graphs are told by the names of their files.

    `measure` takes the speed of a package that is no decoder. Files that this needs lie in `folder` and are gone
    afterwards.
    """
    measure = measure or (lambda directory: _measure_decoder(twin, config, directory))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        total, turns = len(candidates) * (1 + _NUM_ROUNDS), [lowering.name for lowering in candidates] * _NUM_ROUNDS
        for number, lowering in enumerate(candidates):
            progress("timing lowerings", number, total)
            directory = Path(scratch) / lowering.name
            directory.mkdir()
            for name, graph in build(lowering).items():
                save_graph(graph.model, directory, lambda *_: None, name)
            save_package_config(twin.checkpoint.config, directory)
        speeds: dict[str, list[Speed]] = {lowering.name: [] for lowering in candidates}
        for number, name in enumerate(turns, len(candidates)):
            progress("timing lowerings", number, total)
            speeds[name].append(measure(Path(scratch) / name))
        progress("timing lowerings", total, total)
    times = [_time(name, found, config) for name, found in speeds.items()]
    return sorted(times, key=lambda found: found.request_seconds)


def _measure_decoder(twin: Twin, config: OnnxConfig, directory: Path) -> Speed:
    """The speed of a decoder, which is loaded for that alone."""
    vocabulary = min(twin.checkpoint.config.vocab_size, _TIMED_VOCABULARY)
    prompt = np.random.default_rng(0).integers(0, vocabulary, config.request.prompt_tokens)
    decoder = Decoder(directory, PROVIDERS[config.device])
    return measure_speed(decoder, prompt.tolist(), min(config.request.new_tokens, _MOST_NEW_TOKENS), num_rounds=1)


def cut_for_timing(twin: Twin) -> Cut:
    """The part of a model that is timed.

    So many of the first layers as are too large for a core's cache, one with experts among them.
    """
    sizes: dict[int, int] = {}
    for name, entry in twin.checkpoint.entries.items():
        if (layer := layer_of(name)) >= 0:
            sizes[layer] = sizes.get(layer, 0) + math.prod(entry.shape) * twin.scheme["tensors"].get(name, 32) // 8
    total, sparse = 0, False
    for layer in sorted(sizes):
        total += sizes[layer]
        sparse |= twin.family.has_experts(layer, twin.checkpoint.entries)
        if sparse and total >= _TIMED_BYTES:
            break
    else:
        layer = max(sizes)
    return Cut(layer + 1, min(twin.checkpoint.config.vocab_size, _TIMED_VOCABULARY))


def _time(name: str, speeds: Sequence[Speed], config: OnnxConfig) -> LoweringTime:
    speed = Speed(
        statistics.median(found.prefill for found in speeds), statistics.median(found.decode for found in speeds)
    )
    return LoweringTime(
        name,
        speed.prefill,
        speed.decode or None,
        speed.request_seconds(config.request.prompt_tokens, config.request.new_tokens),
    )
