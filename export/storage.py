"""A graph on disk: file names, metadata keys, and weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.progress import Progress

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
MIN_ONNXRUNTIME_KEY = "dense2moe.min_onnxruntime"
LOWERING_KEY = "dense2moe.lowering"


def save_graph(model: ir.Model, directory: Path, progress: Progress) -> int:
    """Write graph and weights, one initializer in memory at a time; returns their bytes."""
    done, total = 0, len(model.graph.initializers)

    def report(*_: Any) -> None:
        nonlocal done
        done += 1
        progress("writing weights", min(done, total), total)

    ir.save(model, directory / MODEL_NAME, external_data=DATA_NAME, callback=report, max_workers=1)
    progress("writing weights", total, total)
    return sum((directory / name).stat().st_size for name in (MODEL_NAME, DATA_NAME))
