"""What rounding costs: perplexity and routing of a fine-tuned mixture under every method of ours, and under those of onnxruntime's own quantizer.

    python benchmarks/quantization.py [--bits 4 8] [--block-size 32] [--blocks 64] [--cache DIRECTORY]
        [--checkpoint DIRECTORY --text FILE --held-out FILE [--separator TEXT]]

The mixture is the quickstart's, fine-tuned by its recipe; with `--checkpoint` the recipe runs on another dense model and its text. All
methods quantize the same matrices, those of experts and attention, in blocks of the same size; router, embedding and head stay in float32. The rivals
of onnxruntime quantize the float32 package that we wrote. Products read activations in float32, so that the weights alone make the difference.
Against float32 on held-out text: perplexity, KL, tokens whose most likely successor is the same, and tokens that meet the same experts in every
layer; and the KL of those that do and of those that do not. `rounding` is what the others are measured by: its loss above float32's is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from export.config import OnnxConfig, QuantizeConfig
from export.package import write_package
from export.parity import same_experts
from export.runtime import ROUTER_LOGITS, Decoder
from export.storage import DATA_NAME, MODEL_NAME
from export.twin import quantize_checkpoint
from upcycle.data import read_blocks

ROOT = Path(__file__).resolve().parent.parent
OURS: dict[str, dict[str, Any]] = {
    "rounding": {"method": "round"}, "searched scales": {"method": "search"}, "GPTQ": {"method": "gptq"},
    "searched scales, zero points": {"method": "search", "zero_points": True}, "GPTQ, zero points": {"method": "gptq", "zero_points": True},
    "GPTQ, all experts see all tokens": {"method": "gptq", "calibrate_all_experts": True},
    "GPTQ + router correction": {"method": "gptq", "correct_routers": True},
    "AWQ + searched scales": {"method": "search", "input_scaling": "awq"}, "AWQ + GPTQ": {"method": "gptq", "input_scaling": "awq"},
}  # fmt: skip
RIVALS: dict[str, Callable[[int, int], Any]] = {
    "onnxruntime, symmetric": lambda bits, block: DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits),
    "onnxruntime, zero points": lambda bits, block: DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=bits),
    "onnxruntime, k-quant": lambda bits, block: KQuantWeightOnlyQuantConfig(),
    "onnxruntime, HQQ": lambda bits, block: HQQWeightOnlyQuantConfig(block_size=block, bits=bits, axis=1),
}
FOUR_BITS_ALONE = ("onnxruntime, k-quant", "onnxruntime, HQQ")


@dataclass(frozen=True)
class Outcome:
    """One package against the float32 one, over the same tokens; losses in nats, shares of tokens."""

    loss: float
    kl: float
    top1: float
    routing: float
    kl_same: float
    kl_flipped: float
    num_bytes: int


def fine_tune(checkpoint: Path | None, text: dict[str, Any], cache: Path) -> tuple[Path, Path]:
    """Run the recipe up to fine-tuning, or find that done; returns the directories of the mixture and of its data."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    cache.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        lines = recipe.read_text(encoding="utf-8").replace("models/python-docs-4m", str(checkpoint.resolve()))
        recipe = cache / "recipe.yaml"
        recipe.write_text(lines.replace("{kind: python-docs}", json.dumps({"kind": "text", **text})), encoding="utf-8")
    command = [sys.executable, "-m", "convert", "run", str(recipe), "--until", "finetune", "--workdir", str(cache / "run")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    artifacts = json.loads((cache / "run" / "run.json").read_text(encoding="utf-8"))["artifacts"]
    return cache / "run" / artifacts["finetune"], cache / "run" / artifacts["data"]


def write_ours(mixture: Path, folder: Path, bits: int, config: QuantizeConfig, blocks: torch.Tensor) -> Path:
    """The package of one of our methods."""
    twin, package = folder / "twin", folder / "package"
    for path in (twin, package):
        path.mkdir(parents=True)
    quantize_checkpoint(mixture, twin, {4: "int4", 8: "int8", 32: "float32"}[bits], config, lambda *_: None, blocks=blocks)
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=32), lambda *_: None)
    return package


def write_rival(floats: Path, folder: Path, bits: int, block_size: int, algorithm: Any) -> Path:
    """The float32 package with every matrix but the routers and the head quantized by onnxruntime."""
    folder.mkdir(parents=True)
    for path in floats.iterdir():
        if path.name not in (MODEL_NAME, DATA_NAME):
            (folder / path.name).symlink_to(path)
    model = onnx.load(floats / MODEL_NAME)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    kept = [node.name for node in model.graph.node if node.op_type == "MatMul" and node not in products]
    kept += [node.name for node in products if node.output[0].startswith((ROUTER_LOGITS, "logits"))]
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=block_size, accuracy_level=1, nodes_to_exclude=kept, algo_config=algorithm)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / MODEL_NAME), use_external_data_format=True)
    found = [node for node in onnx.load(folder / MODEL_NAME, load_external_data=False).graph.node if node.op_type == "MatMulNBits"]
    assert len(found) == len(products) - sum(node.output[0].startswith((ROUTER_LOGITS, "logits")) for node in products), "all are quantized"
    return folder


def weight_bytes(package: Path) -> int:
    """Bytes of what products multiply with, embedding, head and routers left out."""
    model = onnx.load(package / MODEL_NAME)
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    kinds = {node.output[0]: node for node in model.graph.node if node.op_type in ("MatMul", "MatMulNBits")}
    chosen = [node for name, node in kinds.items() if not name.startswith((ROUTER_LOGITS, "logits"))]
    return sum(sizes.get(name, 0) for node in chosen for name in node.input[1:])


def run(decoder: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log probabilities [B, S, V], and router logits [B, S, E] of each layer with experts."""
    found = decoder.run(decoder.new_cache(*ids.shape), ids.numpy())
    routers = [torch.from_numpy(np.array(found[name])).reshape(*ids.shape, -1) for name in decoder.taps if name.startswith(ROUTER_LOGITS)]
    return torch.from_numpy(np.array(found["logits"])).log_softmax(-1), routers


def compare(package: Path, floats: Path, blocks: torch.Tensor) -> Outcome:
    """The package against the float32 one on blocks [N, S]."""
    decoder, reference = Decoder(package, taps=True), Decoder(floats, taps=True)
    top_k = reference.config["num_experts_per_tok"]
    kls, sames, top1s, losses = [], [], [], []
    for ids in blocks.split(4):
        (log_q, routers), (log_p, own_routers) = run(decoder, ids), run(reference, ids)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
        top1s.append((log_p.argmax(-1) == log_q.argmax(-1)).flatten().float())
        sames.append(torch.stack([same_experts(a, b, top_k) for a, b in zip(routers, own_routers, strict=True)]).all(0).flatten())
        losses.append(-log_q[:, :-1].gather(-1, ids[:, 1:, None]).flatten())
    kl, same = torch.cat(kls), torch.cat(sames)
    halves = [float(kl[chosen].mean()) if chosen.any() else 0.0 for chosen in (same, ~same)]
    return Outcome(
        float(torch.cat(losses).mean()), float(kl.mean()), float(torch.cat(top1s).mean()), float(same.float().mean()), *halves, weight_bytes(package)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--separator")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8))
    parser.add_argument("--block-size", type=int, default=32, choices=(16, 32, 64, 128))
    parser.add_argument("--blocks", type=int, default=64)
    arguments = parser.parse_args()
    given = (arguments.checkpoint, arguments.text, arguments.held_out)
    if any(given) and not all(given):
        parser.error("--checkpoint, --text and --held-out go together")
    text: dict[str, Any] = {}
    if all(given):
        text = {"train": [str(arguments.text.resolve())], "test": [str(arguments.held_out.resolve())]}
        text |= {"separator": arguments.separator} if arguments.separator else {}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mixture, data = fine_tune(arguments.checkpoint, text, (arguments.cache or folder / "cache").resolve())
        train, test = read_blocks(data, "train"), read_blocks(data, "test")
        count = min(arguments.blocks, len(test))
        test = test[torch.arange(count) * len(test) // count]
        settings = {"block_size": arguments.block_size, "attention_bits": "variant", "embedding_bits": 16}
        floats = write_ours(mixture, folder / "float32", 32, QuantizeConfig(**settings), train)
        outcomes: dict[tuple[int, str], Outcome | str] = {(32, "float32"): compare(floats, floats, test)}
        for bits in arguments.bits:
            for name, fields in OURS.items():
                package = write_ours(mixture, folder / f"{bits} {name}", bits, QuantizeConfig(**settings, **fields), train)
                outcomes[bits, name] = compare(package, floats, test)
            for name, algorithm in RIVALS.items():
                if bits == 8 and name in FOUR_BITS_ALONE:
                    outcomes[bits, name] = "4 bits alone"
                    continue
                package = write_rival(floats, folder / f"{bits} {name}", bits, arguments.block_size, algorithm(bits, arguments.block_size))
                outcomes[bits, name] = compare(package, floats, test)
    print_table(outcomes, test.numel(), arguments.block_size)


def print_table(outcomes: dict[tuple[int, str], Outcome | str], num_tokens: int, block_size: int) -> None:
    title = (
        f"{datetime.date.today()}, {num_tokens:,} held-out tokens, blocks of {block_size}, onnxruntime {ort.__version__}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
    table = Table(title=title)
    for heading in ("bits", "method", "perplexity", "loss of rounding's", "KL", "top-1", "same experts", "KL same", "KL flipped", "MB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    base = outcomes[32, "float32"]
    assert isinstance(base, Outcome)
    for (bits, name), found in outcomes.items():
        if isinstance(found, str):
            table.add_row(str(bits), name, found)
            continue
        rounding = outcomes.get((bits, "rounding"))
        share = f"{(found.loss - base.loss) / (rounding.loss - base.loss):.2f}" if isinstance(rounding, Outcome) else ""
        change = f"{np.exp(found.loss):.4f} ({np.expm1(found.loss - base.loss):+.2%})"
        table.add_row(
            str(bits), name, change, share, f"{found.kl:.2e}", f"{found.top1:.2%}", f"{found.routing:.2%}", f"{found.kl_same:.2e}",
            f"{found.kl_flipped:.2e}", f"{found.num_bytes / 1e6:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
