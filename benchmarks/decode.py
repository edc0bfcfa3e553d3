"""Decode and prefill of every variant: our runtime against onnxruntime-genai and torch, in one run.

    python benchmarks/decode.py [CHECKPOINT]

Upcycles CHECKPOINT (default: the embedded one) to 4 experts, exports every variant, and times 64 greedy tokens after a
prompt of 128 at batch 1. The engines take turns, and the medians of 5 rounds and their ratios are printed. Our runtime
and genai run the same file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model

EMBEDDED = Path(__file__).parent.parent / "recipes" / "models" / "python-docs-4m"
NUM_PROMPT, NUM_TOKENS, ROUNDS = 128, 64, 5

Engine = Callable[[np.ndarray], tuple[float, float]]
"""Prompt ids to seconds of prefill and seconds of decoding."""


def ours(package: Path) -> Engine:
    decoder = Decoder(package)

    def run(prompt: np.ndarray) -> tuple[float, float]:
        started = time.perf_counter()
        cache = decoder.new_cache(1, NUM_PROMPT + NUM_TOKENS)
        token = decoder.run(cache, prompt[None], logits_to_keep=1)["logits"][0, -1].argmax()
        middle = time.perf_counter()
        for _ in range(NUM_TOKENS):
            token = decoder.run(cache, np.array([[token]]))["logits"][0, -1].argmax()
        return middle - started, time.perf_counter() - middle

    return run


def genai(package: Path) -> Engine:
    model = og.Model(str(package))

    def run(prompt: np.ndarray) -> tuple[float, float]:
        options = og.GeneratorParams(model)
        options.set_search_options(
            min_length=NUM_PROMPT + NUM_TOKENS + 1, max_length=NUM_PROMPT + NUM_TOKENS + 1, do_sample=False
        )
        started = time.perf_counter()
        generator = og.Generator(model, options)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(NUM_TOKENS):
            generator.generate_next_token()
        return middle - started, time.perf_counter() - middle

    return run


def torch_eager(checkpoint: Path) -> Engine:
    model = load_model(checkpoint, torch.float32)

    @torch.inference_mode()
    def run(prompt: np.ndarray) -> tuple[float, float]:
        started = time.perf_counter()
        output = model(input_ids=torch.from_numpy(prompt)[None], use_cache=True)
        middle = time.perf_counter()
        for _ in range(NUM_TOKENS):
            output = model(
                input_ids=output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True
            )
        return middle - started, time.perf_counter() - middle

    return run


def make_engines(checkpoint: Path, folder: Path) -> dict[tuple[str, str], Engine]:
    mixture = folder / "mixture"
    mixture.mkdir()
    upcycle(checkpoint, mixture, UpcycleConfig(num_experts=4, router=RouterConfig(logit_std=1.0)), 0, lambda *_: None)
    engines: dict[tuple[str, str], Engine] = {("float32", "torch"): torch_eager(mixture)}
    variants: list[tuple[str, Variant, int]] = [
        ("float32", "float32", 32),
        ("int8", "int8", 8),
        ("int8, exact activations", "int8", 32),
        ("int4", "int4", 8),
        ("int4, exact activations", "int4", 32),
    ]
    for name, variant, activation_bits in variants:
        twin, package = folder / f"twin {name}", folder / f"package {name}"
        twin.mkdir()
        package.mkdir()
        quantize_checkpoint(mixture, twin, variant, QuantizeConfig(method="search"), lambda *_: None)
        write_package(twin, package, OnnxConfig(activation_bits=8 if activation_bits == 8 else 32), lambda *_: None)
        engines[name, "dense2moe"] = ours(package)
        engines[name, "onnxruntime-genai"] = genai(package)
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=EMBEDDED)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompt = np.random.default_rng(0).integers(2, 500, NUM_PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        engines = make_engines(arguments.checkpoint, Path(folder))
        seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in engines}
        for number in range(ROUNDS + 1):
            for key, engine in engines.items():
                measured = engine(prompt)
                if number:  # the first round warms up
                    seconds[key].append(measured)
    speeds = {
        key: (NUM_PROMPT / statistics.median(s[0] for s in runs), NUM_TOKENS / statistics.median(s[1] for s in runs))
        for key, runs in seconds.items()
    }
    table = Table(
        title=f"tokens per second, {os.cpu_count()} cores, onnxruntime {ort.__version__}, genai {og.__version__}, "
        f"{platform.machine()}"
    )
    for heading in ("variant", "engine", "prefill", "decode", "decode against torch", "decode against genai"):
        table.add_column(heading, justify="left" if heading in ("variant", "engine") else "right")
    for (variant, engine), (prefill, decode) in speeds.items():
        against_torch = f"{decode / speeds['float32', 'torch'][1]:.1f}×"
        against_genai = f"{decode / speeds[variant, 'onnxruntime-genai'][1]:.2f}×" if engine == "dense2moe" else ""
        table.add_row(variant, engine, f"{prefill:,.0f}", f"{decode:,.0f}", against_torch, against_genai)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
