"""The quantizers of others in benchmarks/quantization.py.

Onnxruntime's own on our float32 package, and those of `quantizers.py`. onnxruntime's GPTQ is left out: that of 1.32.0
takes the upper triangle of its factor and reads the lower one, so that no weight makes up for another, and its integers
are those of "onnxruntime, zero points".
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from judging import copy, feeds, products
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from dense2moe.export.storage import DATA_NAME, MODEL_NAME

ONNXRUNTIME: dict[str, Callable[[int, int], Any]] = {
    "onnxruntime, symmetric": lambda bits, block: DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=True, bits=bits
    ),
    "onnxruntime, zero points": lambda bits, block: DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=False, bits=bits
    ),
    "onnxruntime, k-quant": lambda bits, block: KQuantWeightOnlyQuantConfig(),
    "onnxruntime, HQQ": lambda bits, block: HQQWeightOnlyQuantConfig(block_size=block, bits=bits, axis=1),
}
FOUR_BITS_ALONE = ("onnxruntime, k-quant", "onnxruntime, HQQ")


@dataclass(frozen=True)
class Other:
    """A quantizer of `quantizers.py`: its name there, and whose Python it needs."""

    name: str
    python: str
    bits: tuple[int, ...] = (4, 8)


OTHERS = {
    "llama.cpp, Q8_0": Other("llama.cpp-q8_0", "llama_cpp", (8,)),
    "llama.cpp, Q4_0": Other("llama.cpp-q4_0", "llama_cpp", (4,)),
    "llama.cpp, Q4_0, importance": Other("llama.cpp-q4_0+importance", "llama_cpp", (4,)),
    "llama.cpp, Q4_K": Other("llama.cpp-q4_k", "llama_cpp", (4,)),
    "llama.cpp, Q4_K, importance": Other("llama.cpp-q4_k+importance", "llama_cpp", (4,)),
    "GPTQModel": Other("gptqmodel", "gptqmodel"),
}


def write_onnxruntime(floats: Path, folder: Path, bits: int, block_size: int, algorithm: Any) -> Path:
    """The float32 package with its matrices quantized by onnxruntime."""
    copy(floats, folder, MODEL_NAME, DATA_NAME)
    model = onnx.load(floats / MODEL_NAME)
    chosen = {node.name for node in products(model, "MatMul")}
    kept = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in chosen]
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=block_size, accuracy_level=1, nodes_to_exclude=kept, algo_config=algorithm
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / MODEL_NAME), use_external_data_format=True)
    found = onnx.load(folder / MODEL_NAME, load_external_data=False)
    assert len(list(products(found, "MatMulNBits"))) == len(chosen), "all are quantized"
    return folder


def mean_squares(floats: Path, folder: Path, calibration: torch.Tensor) -> dict[str, np.ndarray]:
    """Of every input of a matrix its mean square on the calibration text, by GGUF's name of the tensor.

    What llama.cpp calls importance.
    """
    copy(floats, folder)
    model = onnx.load(floats / MODEL_NAME, load_external_data=False)
    names = sorted({node.input[0] for node in products(model, "MatMul")})
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    onnx.save(model, folder / MODEL_NAME)
    session = ort.InferenceSession(folder / MODEL_NAME, providers=["CPUExecutionProvider"])
    sums, counts = dict.fromkeys(names, np.zeros(1)), dict.fromkeys(names, 0)
    for ids in calibration.split(16):
        for name, found in zip(names, session.run(names, feeds(model, ids)), strict=True):
            rows = found.reshape(-1, found.shape[-1]).astype(np.float64)
            sums[name], counts[name] = sums[name] + (rows**2).sum(0), counts[name] + len(rows)
    means = {name: sums[name] / max(1, counts[name]) for name in names}
    found = {}
    for layer in range(len([name for name in names if name.endswith(".normed")])):
        here = f"layers.{layer}"
        num_experts = len([name for name in names if name.startswith(f"{here}.moe.input.")])
        gate, down = (
            np.stack([means[f"{here}.moe.{part}.{expert}"] for expert in range(num_experts)])
            for part in ("input", "inner")
        )
        found |= {f"blk.{layer}.attn_{part}.weight": means[f"{here}.normed"] for part in "qkv"}
        found |= {
            f"blk.{layer}.attn_output.weight": means[f"{here}.attention"],
            f"blk.{layer}.ffn_down_exps.weight": down,
        }
        found |= {f"blk.{layer}.ffn_{part}_exps.weight": gate for part in ("gate", "up")}
    return found


def run_other(
    other: Other,
    python: Path,
    mixture: Path,
    folder: Path,
    bits: int,
    block_size: int,
    threads: int,
    inputs: dict[str, Path],
) -> dict[str, Any] | str:
    """Quantize in a process of its own into `folder`, where a checkpoint is then.

    Returns its facts, or the last thing that it said.
    """
    settings = {"bits": bits, "block-size": block_size, "threads": threads, **inputs}
    command = [python, Path(__file__).resolve().with_name("quantizers.py"), other.name, mixture, folder]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return (done.stdout.strip() or "nothing said").splitlines()[-1]
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts
