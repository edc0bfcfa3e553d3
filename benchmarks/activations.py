"""What 8-bit activations cost and save, product by product.

Beside llama.cpp's own quantizers and engine on the same text.
    python benchmarks/activations.py CHECKPOINT --train FILE --test FILE [--mixture DIRECTORY]
        [--variants int8 int4] [--chunks 24] [--calibration-tokens N] [--rounds 5]
        [--llama-cpp DIRECTORY --convert SCRIPT] [--cache DIRECTORY] [--threads N] [--only NAME …]

CHECKPOINT is a dense Llama, or with `--mixture` the mixture that is to be quantized; a dense one is upcycled to 4
experts, 2 of them chosen, and not trained. All packages have the lowering `grouped`, so that only what their products
read differs:

- exact: every product reads its input in float32, and inputs are not scaled;
- rounded: every product rounds its input to 8 bits by each block, inputs not scaled;
- scaled: the same behind scaled inputs (`quantize.input_scaling: smooth`), what a recipe has by default;
- scaled, … exact: products of one kind read their scaled input exactly.

KL in nats from the float32 torch model, and the increase of perplexity, are those of llama-perplexity: text in chunks
of 256 tokens, of which the second half counts. Tokens per second are medians over rounds in which all packages have
their turns; a ratio is to `rounded`.

With `--llama-cpp` (the folder of llama-quantize, llama-imatrix and llama-perplexity) and `--convert` (its
convert_hf_to_gguf.py) the same mixture is quantized by llama.cpp: q8_0, q4_0, and Q4_K_M with an importance matrix of
as much of the training text; the figures are what its tool prints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense2moe.convert.machine import describe_machine
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.speed import measure_speed
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle

CHUNK = 256
POINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({"input_scaling": "none"}, {"activation_bits": 32}),
    "rounded": ({"input_scaling": "none"}, {}),
    "scaled": ({"input_scaling": "smooth"}, {}),
    "scaled, head exact": ({"input_scaling": "smooth"}, {"exact_products": ["head"]}),
    "scaled, attention exact": ({"input_scaling": "smooth"}, {"exact_products": ["attention"]}),
    "scaled, experts exact": ({"input_scaling": "smooth"}, {"exact_products": ["experts"]}),
    "scaled, by GPTQ": ({"input_scaling": "smooth", "method": "gptq"}, {}),
    "scaled, by search": ({"input_scaling": "smooth", "method": "search"}, {}),
}
LLAMA_CPP = ("Q8_0", "Q4_0", "Q4_K_M")


@dataclass(frozen=True)
class Loss:
    """KL in nats from the float model, and the relative increase of perplexity, over the second halves of chunks."""

    kl: float
    increase: float


def silent(*_: object) -> None:
    """Report nothing."""


def read_chunks(tokenizer: Any, file: Path, count: int) -> torch.Tensor:
    """The first tokens of a text, [count, CHUNK]; the whole text is tokenized, as llama.cpp does."""
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return ids[: count * CHUNK].view(count, CHUNK)


def float_log_probabilities(mixture: Path, chunks: torch.Tensor) -> list[torch.Tensor]:
    """What the float model says, float16 [CHUNK / 2, V] a chunk.

    Of tokens from the last of the first half on, as llama-perplexity counts them.
    """
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        return [counted(model(ids[None], use_cache=False).logits[0]) for ids in chunks]


def counted(logits: torch.Tensor) -> torch.Tensor:
    return logits[CHUNK // 2 - 1 : -1].log_softmax(-1)


def judge(package: Path, chunks: torch.Tensor, expected: list[torch.Tensor], threads: int) -> Loss:
    decoder = Decoder(package, num_threads=threads)
    kl, increase, count = 0.0, 0.0, 0
    for ids, log_p in zip(chunks, expected, strict=True):
        logits = decoder.run(decoder.new_cache(1, CHUNK), ids[None].numpy())["logits"]
        log_q = counted(torch.from_numpy(np.array(logits))[0])
        targets = ids[CHUNK // 2 :, None]
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        increase += float((log_p - log_q).gather(-1, targets).sum())
        count += len(targets)
    return Loss(kl / count, float(np.expm1(increase / count)))


def package_bytes(package: Path) -> int:
    return sum(path.stat().st_size for path in package.glob("model.onnx*"))


def make_packages(
    mixture: Path, calibration: torch.Tensor, variant: str, cache: Path, names: list[str]
) -> Iterator[tuple[str, Path]]:
    """A package for every point; points with the same integers share a twin, and what is there already is kept."""
    for name in names:
        quantize, export = POINTS[name]
        folder = cache / variant
        twin = folder / f"twin {json.dumps(quantize, sort_keys=True)}".translate(str.maketrans("", "", '{}":,'))
        if not (twin / "done").exists():
            twin.mkdir(parents=True, exist_ok=True)
            config = QuantizeConfig(calibration_tokens=calibration.numel(), **quantize)
            quantize_checkpoint(mixture, twin, variant, config, silent, QuantizeInputs(blocks=calibration))  # type: ignore[arg-type]
            (twin / "done").touch()
        package = folder / name
        if not (package / "genai_config.json").exists():
            package.mkdir(parents=True, exist_ok=True)
            write_package(twin, package, OnnxConfig(lowering="grouped", **export), silent)
        yield name, package


def race(packages: dict[str, Path], prompt: list[int], rounds: int, threads: int) -> dict[str, tuple[float, float]]:
    """Tokens per second of prefill and decode, medians.

    In a round every package is loaded for its turn, and every other round goes backwards.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in packages}
    for number in range(rounds):
        for name, package in list(packages.items())[:: -1 if number % 2 else 1]:
            speed = measure_speed(Decoder(package, num_threads=threads), prompt, 32, num_rounds=1)
            found[name].append((speed.prefill, speed.decode))
    return {name: tuple(map(statistics.median, zip(*speeds, strict=True))) for name, speeds in found.items()}  # type: ignore[misc]


def run_llama_cpp(
    mixture: Path, cache: Path, arguments: argparse.Namespace, num_calibration_chunks: int
) -> Iterator[tuple[str, Loss, int]]:
    """llama.cpp's own quantizers and its own measure of them."""
    tools, whole, importance, base = (
        arguments.llama_cpp,
        cache / "f32.gguf",
        cache / "importance.gguf",
        cache / "base.kld",
    )
    common = ["-c", str(CHUNK), "-b", str(CHUNK), "-t", str(arguments.threads)]
    measured = [
        *common,
        "-f",
        str(arguments.test),
        "--chunks",
        str(arguments.chunks),
        "--kl-divergence-base",
        str(base),
    ]

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.stdout

    if not whole.exists():
        run(sys.executable, arguments.convert, mixture, "--outtype", "f32", "--outfile", whole)
    if not base.exists():
        run(tools / "llama-perplexity", "-m", whole, *measured)
    if not importance.exists():
        run(
            tools / "llama-imatrix",
            "-m",
            whole,
            "-f",
            arguments.train,
            *common,
            "--chunks",
            num_calibration_chunks,
            "-o",
            importance,
        )
    for kind in LLAMA_CPP:
        file, told = cache / f"{kind}.gguf", cache / f"{kind}.txt"
        if not told.exists():
            run(
                tools / "llama-quantize",
                *(["--imatrix", importance] if kind == "Q4_K_M" else []),
                whole,
                file,
                kind,
                arguments.threads,
            )
            text = ""
            while "Mean    KLD" not in text:  # the tool may end before it has written out its last lines
                text = run(tools / "llama-perplexity", "-m", file, *measured, "--kl-divergence")
            told.write_text(text, encoding="utf-8")
        text = told.read_text(encoding="utf-8")
        kl, ratio = (
            float(re.search(rf"Mean +{name} *: +([-\d.]+)", text)[1]) for name in ("KLD", r"PPL\(Q\)/PPL\(base\)")
        )  # type: ignore[index]
        yield f"llama.cpp {kind}{', importance' if kind == 'Q4_K_M' else ''}", Loss(kl, ratio - 1), file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--mixture", action="store_true", help="the checkpoint is a mixture already")
    parser.add_argument("--variants", nargs="+", default=["int8", "int4"])
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--convert", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/activations"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    arguments = parser.parse_args()
    cache: Path = arguments.cache
    cache.mkdir(parents=True, exist_ok=True)
    mixture = arguments.checkpoint if arguments.mixture else cache / "mixture"
    if not mixture.exists():
        mixture.mkdir()
        upcycle(arguments.checkpoint, mixture, UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, silent)
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    chunks = read_chunks(tokenizer, arguments.test, arguments.chunks)
    calibration = read_chunks(tokenizer, arguments.train, arguments.calibration_tokens // CHUNK)
    expected = float_log_probabilities(mixture, chunks)
    print(
        f"{describe_machine()}; onnxruntime {ort.__version__}; {chunks.numel() // 2:,} tokens counted, "
        f"{calibration.numel():,} to calibrate on\n"
    )
    print(
        "| weights | activations | KL, nats | perplexity | MB | prefill, tokens/s | decode, tokens/s | prefill | "
        "decode |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for variant in arguments.variants:
        packages = dict(make_packages(mixture, calibration, variant, cache, arguments.only))
        losses = {name: judge(package, chunks, expected, arguments.threads) for name, package in packages.items()}
        speeds = race(packages, chunks[0].tolist(), arguments.rounds, arguments.threads)
        base = speeds.get("rounded", next(iter(speeds.values())))
        for name, package in packages.items():
            loss, (prefill, decode) = losses[name], speeds[name]
            ratios = f"{prefill / base[0]:.2f} × | {decode / base[1]:.2f} ×"
            size = package_bytes(package) / 1e6
            print(
                f"| {variant} | {name} | {loss.kl:.2e} | {loss.increase:+.2%} | {size:.1f} | {prefill:,.0f} | "
                f"{decode:,.1f} | {ratios} |",
                flush=True,
            )
    if arguments.llama_cpp:
        for name, loss, size in run_llama_cpp(mixture, cache, arguments, max(1, len(calibration))):
            print(f"| {name} | | {loss.kl:.2e} | {loss.increase:+.2%} | {size / 1e6:.1f} | | | | |", flush=True)


if __name__ == "__main__":
    main()
