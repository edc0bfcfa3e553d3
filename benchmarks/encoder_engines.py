"""The engines that benchmarks/encoders.py races, each a process that answers over its standard streams.

    PYTHON benchmarks/encoder_engines.py run ENGINE PATH THREADS
    PYTHON benchmarks/encoder_engines.py make KIND CHECKPOINT OUTPUT

A rival lives in a Python of its own, so nothing but numpy is imported before it is known which engine this is. A line
in is a request as JSON, `{"rows": 8, "length": 128, "seed": 0, "padded": false}`; a line out is its answer,
`{"seconds": ...}`, and for a padded batch the last hidden state too. `make` writes the file that a rival runs: what
transformers' exporter makes for onnxruntime or for OpenVINO, its weights in 8 or 4 bits where the kind says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

OUTPUT, NOTE = "last_hidden_state", "note.txt"
IMAGE = (3, 224, 224)
Inputs = dict[str, np.ndarray]


def draw_inputs(names: Iterable[str], rows: int, length: int, seed: int, padded: bool) -> Inputs:
    """Ids, masks and types [rows, length], or images; of a padded batch row n misses its last 10 n tokens."""
    random = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int64)
    if padded:
        mask[np.arange(length) >= length - 10 * np.arange(rows)[:, None]] = 0
    made: dict[str, Callable[[], np.ndarray]] = {
        "input_ids": lambda: random.integers(1000, 30000, (rows, length)),
        "attention_mask": lambda: mask,
        "token_type_ids": lambda: np.zeros((rows, length), np.int64),
        "pixel_values": lambda: random.standard_normal((rows, *IMAGE)).astype(np.float32),
    }
    return {name: make() for name, make in made.items() if name in names}


class Engine(Protocol):
    """A model that is loaded: the names that it reads, and its last hidden state."""

    names: list[str]

    def run(self, inputs: Inputs) -> np.ndarray:
        """The last hidden state [rows, tokens, H]."""


class Ours:
    """dense2moe's runtime on dense2moe's package."""

    packages = ("onnxruntime",)

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from dense2moe.export.runtime.single_pass import SinglePass

        self.tensor = torch.from_numpy
        self.package = SinglePass(path, num_threads=threads)
        self.names = list(self.package.inputs)

    def run(self, inputs: Inputs) -> np.ndarray:
        return self.package.run({name: self.tensor(value) for name, value in inputs.items()})[OUTPUT].numpy()


class PlainOnnx:
    """onnxruntime on the graph of transformers' exporter."""

    packages = ("onnxruntime", "transformers")

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def run(self, inputs: Inputs) -> np.ndarray:
        (found,) = self.session.run([OUTPUT], inputs)
        return np.asarray(found)


class OpenVino:
    """OpenVINO on what transformers' exporter writes for it, in float32, where its default may be bfloat16."""

    packages = ("openvino", "nncf")

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(core.read_model(path / "openvino_model.xml"), "CPU", settings)
        self.names = [value.any_name for value in compiled.inputs]
        self.request = compiled.create_infer_request()

    def run(self, inputs: Inputs) -> np.ndarray:
        self.request.infer(inputs)
        return np.array(self.request.get_tensor(OUTPUT).data)


class Torch:
    """transformers in eager torch, float32, under one of its implementations of experts."""

    packages = ("torch", "transformers")

    def __init__(self, path: Path, threads: int, implementation: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.model = torch, load(path)
        self.model.set_experts_implementation(implementation)
        self.names = ["pixel_values"] if hasattr(self.model.config, "image_size") else ["input_ids", "attention_mask"]

    def run(self, inputs: Inputs) -> np.ndarray:
        with self.torch.inference_mode():
            given = {name: self.torch.from_numpy(value) for name, value in inputs.items()}
            return np.asarray(self.model(**given).last_hidden_state)


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "dense2moe": Ours,
    "onnx": PlainOnnx,
    "openvino": OpenVino,
    "torch-eager": partial(Torch, implementation="eager"),
    "torch-grouped": partial(Torch, implementation="grouped_mm"),
}


def load(path: Path) -> Any:
    """A checkpoint by transformers alone."""
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=True, add_pooling_layer=False).eval()


def answer(engine: Engine, rows: int, length: int, seed: int, padded: bool) -> dict[str, Any]:
    inputs = draw_inputs(engine.names, rows, length, seed, padded)
    started = time.perf_counter()
    found = engine.run(inputs)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **({OUTPUT: found.tolist()} if padded else {})}


def run(name: str, path: Path, threads: int) -> None:
    """Serve until standard input ends. Whatever an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[name](path, threads)
    there = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    packages = [package for package in getattr(engine, "packages", ()) if package in there]
    note = (path / NOTE).read_text() if (path / NOTE).exists() else ""
    hello = {"versions": [f"{package} {there[package]}" for package in packages], "note": note}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, **json.loads(line))), file=answers, flush=True)


def make(kind: str, checkpoint: Path, output: Path) -> None:
    """What transformers' exporter makes for onnxruntime, with its fusions for the CPU, or for OpenVINO."""
    import torch

    model = load(checkpoint)
    names = ("pixel_values",) if hasattr(model.config, "image_size") else ("input_ids", "attention_mask")
    inputs = {name: torch.from_numpy(value) for name, value in draw_inputs(names, 2, 16, 0, padded=False).items()}
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys((0,) if value.dim() == 4 else (0, 1), dynamic) for name, value in inputs.items()}
    program, _, bits = kind.partition("-")
    if program == "onnx":
        export_onnx(checkpoint, inputs, shapes, output, in_8_bits=bool(bits))
        return
    import openvino
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic_shapes=shapes)).save_pretrained(output)
    if bits:
        import nncf

        path = output / "openvino_model.xml"
        modes: dict[str, dict[str, Any]] = {
            "int8": {"mode": nncf.CompressWeightsMode.INT8_SYM},
            "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 128, "ratio": 1.0},
        }
        smaller = nncf.compress_weights(openvino.Core().read_model(path), **modes[bits])
        openvino.save_model(smaller, output / "smaller.xml", compress_to_fp16=False)
        for ending in ("xml", "bin"):
            (output / f"smaller.{ending}").replace(path.with_suffix(f".{ending}"))


def export_onnx(
    checkpoint: Path, inputs: dict[str, Any], shapes: dict[str, Any], output: Path, in_8_bits: bool
) -> None:
    """With the fusions for the CPU, or where these fail without them, which the note says."""
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    for fusions in ("cpu", None):
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig()) if in_8_bits else None
        wish = OnnxConfig(dynamic_shapes=shapes, ort_fusions=fusions, quantizer=quantizer)
        try:
            OnnxExporter().export(load(checkpoint), inputs, config=wish).save_pretrained(output)
        except Exception as error:
            if fusions is None:
                raise
            print(f"fusions: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            (output / NOTE).write_text("" if fusions else "without its fusions, which fail")
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("engine", choices=ENGINES)
    runner.add_argument("path", type=Path)
    runner.add_argument("threads", type=int)
    maker = commands.add_parser("make")
    maker.add_argument("kind", choices=("onnx", "onnx-int8", "openvino", "openvino-int8", "openvino-int4"))
    maker.add_argument("checkpoint", type=Path)
    maker.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.engine, arguments.path, arguments.threads)
    else:
        make(arguments.kind, arguments.checkpoint, arguments.output)


if __name__ == "__main__":
    main()
