"""Prefill and decode of a mixture in float32, int8 and int4.

Dense2moe against llama.cpp, OpenVINO, onnxruntime-genai and others.
    python benchmarks/inference.py --llama-cpp PYTHON --openvino PYTHON --exporter PYTHON

Two Mixtrals of random weights (8 experts of which 2 are chosen, routers scaled so that the choice is decided): `150m`,
8 layers of 512/1408, and `1b`, 12 layers of 1024/2816. Each engine is a process of its own (`engines.py`) with
`--threads` threads; they take turns, each round from the next one on. A turn is a prefill of 256 random tokens and 64
more one by one, so that different experts are met; medians over all rounds. Engines whose weights do not fit into
memory together are loaded anew for every turn. In each precision

- dense2moe: `quantize` and `write_package` with `lowering: auto`; one scale in float32 for a block of 64 weights,
  embedding and attention quantized as the experts are: 8.5 and 4.5 bits a weight, exactly those of llama.cpp's q8_0 and
  q4_0 (float16 scales for blocks of 32);
- dense2moe with `lowering: switched` where experts are integers: the fastest graph, with the experts in it twice;
- dense2moe on a dense Llama with the same active weights: an FFN of 2 × the width;
- onnxruntime-genai on dense2moe's packages;
- llama.cpp on the same weights as GGUF, f32, q8_0 and q4_0; `--llama-cpp` is a Python with llama-cpp-python, gguf and
  safetensors;
- and in float32 alone torch in eager mode, transformers' exporter on onnxruntime, and OpenVINO on what transformers'
  exporter writes for it. `--exporter` is a Python with torch, transformers, onnxscript, and openvino for OpenVINO's;
  `--openvino` is one with openvino.

In float32 the logits of every engine are compared with dense2moe's; more than 1e-3 of the largest ends the run. The
limit is the bandwidth of reading 2 GiB, measured here, divided by the bytes of the weights that a token meets: its
experts, attention, norms, routers, head, a row of the embedding. What the processor's caches keep is read faster than
that, and the share may then exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from race_tables import print_exports, print_machine, print_speeds, print_targets
from racing import (
    DENSE,
    EXPORTER,
    GENAI,
    GENAI_SWITCHED,
    GGUF_KINDS,
    LLAMA,
    MOST_RELATIVE_ERROR,
    NAMED_LOWERING,
    NUM_EXPERTS,
    OPENVINO,
    OURS,
    PRECISIONS,
    ROUTER_FACTOR,
    SWITCHED,
    TOP_K,
    TORCH,
    WEIGHT_BITS,
    Contender,
    EngineError,
    Race,
    Result,
    run_child,
)
from rich.console import Console
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.writer import TensorSpec, write_tensors


@dataclass(frozen=True)
class Model:
    """A Mixtral, or the Llama with the same active weights."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int

    def config(self, dense: bool) -> PreTrainedConfig:
        """The config of transformers; heads of 64, half as many of keys and values."""
        shape = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": torch.float32,
        }
        if dense:
            return LlamaConfig(intermediate_size=TOP_K * self.intermediate, architectures=["LlamaForCausalLM"], **shape)
        experts = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "sliding_window": None}
        return MixtralConfig(
            intermediate_size=self.intermediate, architectures=["MixtralForCausalLM"], **experts, **shape
        )

    def tensors(self, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the checkpoint."""
        hidden, width = self.hidden, TOP_K * self.intermediate if dense else self.intermediate
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for letter, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
                yield f"{prefix}.self_attn.{letter}_proj.weight", (rows, hidden)
            for norm in ("input", "post_attention"):
                yield f"{prefix}.{norm}_layernorm.weight", (hidden,)
            if dense:
                matrices = {f"{prefix}.mlp.{part}_proj": part == "down" for part in ("gate", "up", "down")}
            else:
                sparse = f"{prefix}.block_sparse_moe"
                yield f"{sparse}.gate.weight", (NUM_EXPERTS, hidden)
                matrices = {
                    f"{sparse}.experts.{expert}.{part}": part == "w2"
                    for expert in range(NUM_EXPERTS)
                    for part in ("w1", "w2", "w3")
                }
            for name, down in matrices.items():
                yield f"{name}.weight", (hidden, width) if down else (width, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def num_weights(self) -> int:
        """Of the mixture."""
        return sum(math.prod(shape) for _, shape in self.tensors(False))

    def active_bytes(self, precision: Variant) -> float:
        """Bytes of the weights that a token meets; routers and norms are in float32. The cache is not counted."""
        total = 0.0
        for name, shape in self.tensors(False):
            bits = 32.0 if len(shape) == 1 or name.endswith("gate.weight") else WEIGHT_BITS[precision]
            share = (
                TOP_K / NUM_EXPERTS if ".experts." in name else 1 / self.vocabulary if "embed_tokens" in name else 1.0
            )
            total += share * math.prod(shape) * bits / 8
        return total


MODELS = {"150m": Model("150m", 8, 512, 1408, 8, 4096), "1b": Model("1b", 12, 1024, 2816, 16, 8192)}


def make_checkpoint(model: Model, directory: Path, dense: bool) -> None:
    """Write a checkpoint of normal weights (deviation 0.02, transformers' own), tensor by tensor from the seed 0."""
    shapes = dict(model.tensors(dense))

    def draw() -> Iterator[tuple[str, torch.Tensor]]:
        torch.manual_seed(0)
        for name, shape in shapes.items():
            deviation = 0.02 * (ROUTER_FACTOR if name.endswith("gate.weight") else 1.0)
            yield name, torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * deviation

    write_tensors(
        directory, [TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()], draw(), 5_000_000_000
    )
    model.config(dense).save_pretrained(directory)


@dataclass(frozen=True)
class Export:
    """One `write_package` in a process of its own; `wish` is the lowering asked for."""

    wish: str
    lowering: str
    seconds: float
    peak_bytes: int
    num_bytes: int


def export_package(
    source: Path, packages: Sequence[Path], precision: Variant, wishes: Sequence[str], scratch: Path
) -> list[Export]:
    """Quantize, and write one package for each lowering asked for; the first ones are kept, as `packages`."""
    twin, exports = scratch / "twin", []
    this = (sys.executable, Path(__file__).resolve())
    run_child((*this, "--run-quantize", source, twin, precision), scratch / "quantize.log")
    for number, wish in enumerate(wishes):
        output = packages[number] if number < len(packages) else scratch / "dropped"
        printed, peak, seconds = run_child((*this, "--run-package", twin, output, wish), scratch / "package.log")
        lowering, num_bytes = printed.split()[-2:]
        exports.append(Export(wish, lowering, seconds, peak, int(num_bytes)))
        shutil.rmtree(scratch / "dropped", ignore_errors=True)
    shutil.rmtree(twin)
    return exports


def run_quantize(source: Path, output: Path, precision: str) -> None:
    from dense2moe.export.quantization.quantizer import quantize_checkpoint

    output.mkdir()
    variant = next(name for name in PRECISIONS if name == precision)
    quantize_checkpoint(
        source,
        output,
        variant,
        QuantizeConfig(method="search", block_size=64, attention_bits="variant", embedding_bits="variant"),
        lambda *_: None,
    )


def run_package(source: Path, output: Path, lowering: str) -> None:
    from dense2moe.export.package import write_package

    output.mkdir()
    facts = write_package(source, output, OnnxConfig.model_validate({"lowering": lowering}), lambda *_: None)
    print(facts.lowering, facts.package_bytes)


def measure_bandwidth(threads: int) -> tuple[float, str]:
    """Bytes per second of reading 2 GiB, and the fastest of the ways to read them, best of three.

    It has a process of its own: Linux counts what this one held at its peak as the peak of every child that it starts
    later.
    """
    torch.set_num_threads(threads)
    matrix = torch.ones(1 << 15, 1 << 14)
    vector = torch.ones(1 << 14)
    halves = np.array_split(matrix.numpy().ravel(), threads)

    def dot_in_threads() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda half: np.dot(half[: len(half) // 2], half[len(half) // 2 :]), halves))

    ways: dict[str, Callable[[], object]] = {
        "torch.sum": lambda: matrix.sum(),
        "torch.mv": lambda: matrix @ vector,
        "numpy.dot, a thread a part": dot_in_threads,
    }
    found = {}
    for name, way in ways.items():
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - started)
        found[name] = matrix.numel() * 4 / min(seconds)
    best = max(found, key=lambda name: found[name])
    return found[best], best


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or directory of the cache, made if it is not there."""
    if not path.exists():
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(path)
    return path


def imports(python: Path, names: str) -> str:
    """Empty if a Python can import these modules, or else why it cannot."""
    done = subprocess.run([python, "-c", f"import {names}"], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@dataclass(frozen=True)
class Pythons:
    """Where the rivals live; None is not given."""

    llama: Path | None
    openvino: Path | None
    exporter: Path


def make_rival_files(model: Model, checkpoint: Path, files: Path, pythons: Pythons) -> dict[str, str]:
    """What transformers' exporter writes, for onnxruntime and OpenVINO side by side where memory allows.

    Returns why one could not be made.
    """
    jobs = {EXPORTER: ("onnx", imports(pythons.exporter, "torch, transformers, onnxscript"))}
    if pythons.openvino:
        jobs[OPENVINO] = ("openvino", imports(pythons.exporter, "torch, transformers, openvino"))
    reasons = {name: f"--exporter: {missing}" for name, (_, missing) in jobs.items() if missing}

    def make(name: str) -> None:
        kind = jobs[name][0]
        command = (pythons.exporter, Path(__file__).resolve().with_name("engines.py"), "make", kind, checkpoint)
        log = files / f"make-{kind}.log"
        try:
            made(files / kind, lambda partial: run_child((*command, partial), log))
        except EngineError as error:
            reasons[name] = str(error)

    able = [name for name in jobs if name not in reasons]
    at_once = len(able) if psutil.virtual_memory().available > 5 * 4 * model.num_weights else 1
    if able:
        print(f"  transformers' exporter: {', '.join(able)}", file=sys.stderr)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(make, able))
    return reasons


def find_contenders(
    precision: Variant,
    checkpoint: Path,
    files: Path,
    packages: tuple[Path, Path, Path],
    pythons: Pythons,
    reasons: dict[str, str],
) -> tuple[list[Contender], dict[str, str]]:
    """Who runs in a precision, and why the others do not."""
    this, left_out = Path(sys.executable), {}
    package, dense, switched = packages
    contenders = [Contender(OURS, this, package), Contender(DENSE, this, dense)]
    missing = imports(this, "onnxruntime_genai")
    if missing:
        left_out[GENAI] = missing
    else:
        contenders.append(Contender(GENAI, this, package))
    if precision == "float32":
        left_out |= dict.fromkeys((SWITCHED, GENAI_SWITCHED), "of integers alone")
    else:
        contenders.append(Contender(SWITCHED, this, switched))
        if missing:
            left_out[GENAI_SWITCHED] = missing
        else:
            contenders.append(Contender(GENAI_SWITCHED, this, switched))
    if not pythons.llama:
        left_out[LLAMA] = "no --llama-cpp"
    elif missing := imports(pythons.llama, "llama_cpp, gguf, safetensors"):
        left_out[LLAMA] = f"--llama-cpp: {missing}"
    else:
        kind, python = GGUF_KINDS[precision], pythons.llama
        script = Path(__file__).resolve().with_name("engines.py")
        command = (python, script, "make", "gguf", checkpoint)
        try:
            path = made(
                files / f"model-{kind}.gguf",
                lambda partial: run_child((*command, partial, kind), files / "make-gguf.log"),
            )
            contenders.append(Contender(LLAMA, python, path))
        except EngineError as error:
            left_out[LLAMA] = str(error)
    if precision != "float32":
        left_out[EXPORTER] = "its int8 leaves the experts in float32"
        left_out[OPENVINO] = "compressing weights is nncf's, another package"
        left_out[TORCH] = "float32 alone"
        return contenders, left_out
    contenders.append(Contender(TORCH, this, checkpoint))
    if EXPORTER in reasons:
        left_out[EXPORTER] = reasons[EXPORTER]
    else:
        contenders.append(Contender(EXPORTER, this, files / "onnx"))
    if not pythons.openvino:
        left_out[OPENVINO] = "no --openvino"
    elif OPENVINO in reasons:
        left_out[OPENVINO] = reasons[OPENVINO]
    else:
        contenders.append(Contender(OPENVINO, pythons.openvino, files / "openvino"))
    return contenders, left_out


def compare_logits(results: dict[str, Result]) -> dict[str, float]:
    """Largest difference from our logits relative to the largest of them, over prompt and first tokens.

    Raises:
        SystemExit: a rival computes another model.
    """
    ours = results[OURS].logits
    assert ours is not None
    errors = {
        name: float(np.abs(result.logits - ours).max() / np.abs(ours).max())
        for name, result in results.items()
        if result.logits is not None and name not in (OURS, SWITCHED, DENSE)
    }
    wrong = {name: error for name, error in errors.items() if not error <= MOST_RELATIVE_ERROR}
    if wrong:
        raise SystemExit(
            f"logits in float32 differ from dense2moe's by {wrong}; must be at most {MOST_RELATIVE_ERROR}: not the "
            "same model"
        )
    return errors


@dataclass
class Outcome:
    """One model, raced.

    Results by precision and engine, exports by precision, the errors in float32, and the bandwidth.
    """

    model: Model
    results: dict[Variant, dict[str, Result]]
    exports: dict[Variant, list[Export]]
    errors: dict[str, float]
    bandwidth: float
    way: str

    def limit(self, precision: Variant) -> float:
        """Tokens per second that reading the active weights allows."""
        return self.bandwidth / self.model.active_bytes(precision)


def run_model(model: Model, arguments: argparse.Namespace, pythons: Pythons, scratch: Path, cache: Path) -> Outcome:
    files = cache / model.name
    files.mkdir(exist_ok=True)
    print(f"{model.name}: checkpoints", file=sys.stderr)
    checkpoint = made(files / "mixture", lambda partial: (partial.mkdir(), make_checkpoint(model, partial, False)))
    dense = made(files / "dense", lambda partial: (partial.mkdir(), make_checkpoint(model, partial, True)))
    reasons = make_rival_files(model, checkpoint, files, pythons)
    command = (sys.executable, Path(__file__).resolve(), "--run-bandwidth", "--threads", arguments.threads)
    bandwidth, way = json.loads(run_child(command, scratch / "bandwidth.log")[0])
    outcome = Outcome(model, {}, {}, {}, bandwidth, way)
    for precision in PRECISIONS:
        print(f"{model.name}, {precision}: export", file=sys.stderr)
        packages = (scratch / "package", scratch / "dense-package", scratch / "switched")
        wishes, kept = (
            (("auto", NAMED_LOWERING), packages[:1])
            if precision == "float32"
            else (("auto", "switched"), packages[::2])
        )
        outcome.exports[precision] = export_package(checkpoint, kept, precision, wishes, scratch)
        export_package(dense, packages[1:2], precision, ("auto",), scratch)
        contenders, left_out = find_contenders(precision, checkpoint, files, packages, pythons, reasons)
        race = Race(model.vocabulary, arguments.threads, scratch)
        race.results[OURS] = Result(note=f"lowering {outcome.exports[precision][0].lowering}")
        race.run(contenders, arguments.rounds)
        race.results |= {name: Result(left_out=reason) for name, reason in left_out.items()}
        for name in (OURS, DENSE):
            if race.results[name].left_out:
                raise SystemExit(f"{model.name}, {precision}, {name}: {race.results[name].left_out}")
        outcome.results[precision] = race.results
        if precision == "float32":
            outcome.errors = compare_logits(race.results)
        for package in packages:
            shutil.rmtree(package, ignore_errors=True)
        if not arguments.cache:
            for path in (files / "onnx", files / "openvino"):
                shutil.rmtree(path, ignore_errors=True)
            (files / f"model-{GGUF_KINDS[precision]}.gguf").unlink(missing_ok=True)
    if not arguments.cache:
        shutil.rmtree(files)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="PYTHON", help="a Python with llama-cpp-python, gguf and safetensors"
    )
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="a Python with openvino")
    parser.add_argument(
        "--exporter",
        type=Path,
        metavar="PYTHON",
        default=Path(sys.executable),
        help="a Python with torch, transformers, onnxscript, openvino",
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cache", type=Path, help="keep the checkpoints and the rivals' files in this directory, and use those there"
    )
    # The parts that this script runs as processes of their own.
    parser.add_argument("--run-quantize", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--run-package", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--run-bandwidth", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_bandwidth:
        print(json.dumps(measure_bandwidth(arguments.threads)))
    elif arguments.run_quantize:
        source, output, precision = arguments.run_quantize
        run_quantize(Path(source), Path(output), precision)
    elif arguments.run_package:
        source, output, lowering = arguments.run_package
        run_package(Path(source), Path(output), lowering)
    else:
        run_benchmark(arguments)


def run_benchmark(arguments: argparse.Namespace) -> None:
    given = [
        path.absolute() if path else None for path in (arguments.llama_cpp, arguments.openvino, arguments.exporter)
    ]
    for path in given:
        if path and not os.access(path, os.X_OK):
            raise SystemExit(f"{path}: not an executable; must be the path of a Python")
    assert given[2]
    pythons = Pythons(given[0], given[1], given[2])
    console = Console(width=170)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "scratch").mkdir()
        cache = arguments.cache.resolve() if arguments.cache else folder
        cache.mkdir(parents=True, exist_ok=True)
        for key, model in MODELS.items():
            if arguments.model in (key, "both"):
                outcome = run_model(model, arguments, pythons, folder / "scratch", cache)
                print_machine(outcome, arguments.threads)
                print_speeds(outcome, console)
                print_exports(outcome, console)
                print_targets(outcome)


if __name__ == "__main__":
    main()
