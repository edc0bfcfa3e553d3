"""One pass of a BERT and a ViT whose FFNs are mixtures, in float32, int8 and int4.

Dense2moe against transformers' exporter on onnxruntime, OpenVINO, torch, and a dense model of the same active weights.
    python benchmarks/encoders.py --openvino PYTHON

BERT-base and ViT-B shapes (768/3072, 12 heads) with 3 of their 12 layers, of random weights: layers are alike, so a
layer's cost is what counts. Every FFN becomes 8 experts, of which a token visits 2; experts differ, routers are drawn.
BERT reads 1 and 8 texts of 128 tokens, ViT 1 and 8 images of 224 x 224. Each engine is a process of its own
(`encoder_engines.py`) with `--threads` threads; they take turns, each round from the next one on, and the table has
medians. In each precision

- dense2moe: `quantize` and `write_package` with `lowering: auto`; integers have one scale for 128 weights of a row;
- the dense model of the same active weights, an FFN of twice the width, written by dense2moe as the mixture is: a
  mixture of which no layer has experts;
- transformers' exporter with `ort_fusions="cpu"` on onnxruntime, of the mixture and of the dense model; in int8 by its
  own dynamic quantizer, which leaves experts in float32; where its fusions fail, as on the ViT, without them;
- OpenVINO on what transformers' exporter writes for it; in int8 and int4 its weights compressed by nncf;
  `--openvino` is a Python with torch, transformers, openvino and nncf;
- and in float32 alone torch in eager mode, with the layer's own loop over experts and with transformers' `grouped_mm`.

optimum-onnx knows no mixture, and torch.onnx alone follows neither of its implementations. In float32 the last hidden
state of every engine on 8 padded texts, or 8 images, is compared with dense2moe's; more than 1e-3 of its largest number
ends the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_engines import OUTPUT
from inference import imports, made
from race_tables import judge, print_machine
from racing import MOST_AGAINST_DENSE, MOST_RELATIVE_ERROR, PRECISIONS, Contender, EngineError, Running, run_child
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel

from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.mixture_classes import find_class
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

OURS, DENSE, EXPORTER, EXPORTER_DENSE, OPENVINO, TORCH, TORCH_GROUPED = (
    "dense2moe",
    "dense2moe, dense model",
    "transformers' exporter",
    "transformers' exporter, dense model",
    "OpenVINO",
    "torch eager",
    "torch grouped_mm",
)
MIXTURES = (OURS, EXPORTER, OPENVINO, TORCH, TORCH_GROUPED)
NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH, BLOCK = 3, 8, 2, 3072, 128
BATCHES, LENGTH = (1, 8), 128
SCRIPT = "encoder_engines.py"


@dataclass(frozen=True)
class Model:
    """A dense encoder, and what a row of its input is called."""

    name: str
    config_class: Any
    model_class: Any
    row: str

    def make(self, width: int) -> PreTrainedModel:
        """Random weights, FFNs of this width."""
        torch.manual_seed(0)
        config = self.config_class(num_hidden_layers=NUM_LAYERS, intermediate_size=width)
        model: PreTrainedModel = self.model_class(config, add_pooling_layer=False)
        return model


MODELS = (
    Model("bert-base", BertConfig, BertModel, f"x {LENGTH} tokens"),
    Model("vit-b", ViTConfig, ViTModel, "x 224 x 224 pixels"),
)


@dataclass(frozen=True)
class Checkpoints:
    """The mixture; the dense model of its active weights, as transformers' and as a mixture without experts."""

    mixture: Path
    wide: Path
    without_experts: Path


def make_checkpoints(model: Model, files: Path) -> Checkpoints:
    def make_mixture(output: Path) -> None:
        output.mkdir()
        experts = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "experts": {"noise": 0.3}}
        upcycle(dense, output, UpcycleConfig.model_validate(experts), 0, lambda *_: None)

    def make_without_experts(output: Path) -> None:
        config: Any = open_checkpoint(mixture).config
        config.intermediate_size = TOP_K * WIDTH
        for site in config.mixture["sites"]:
            site["layers"] = []
        torch.manual_seed(0)
        found = find_class(config.architectures[0])(config, add_pooling_layer=False)
        found.load_state_dict(model.make(TOP_K * WIDTH).state_dict())
        found.save_pretrained(output)

    dense = made(files / "dense", model.make(WIDTH).save_pretrained)
    mixture = made(files / "mixture", make_mixture)
    wide = made(files / "wide", model.make(TOP_K * WIDTH).save_pretrained)
    return Checkpoints(mixture, wide, made(files / "without-experts", make_without_experts))


def export_package(checkpoint: Path, output: Path, precision: Variant) -> str:
    """Our package; returns its lowering."""
    from dense2moe.export.graph.config import OnnxConfig
    from dense2moe.export.package import write_package
    from dense2moe.export.quantization.config import QuantizeConfig
    from dense2moe.export.quantization.quantizer import quantize_checkpoint

    with tempfile.TemporaryDirectory(dir=output.parent) as twin:
        quantize = QuantizeConfig(method="search", block_size=BLOCK, attention_bits="variant", embedding_bits="variant")
        quantize_checkpoint(checkpoint, Path(twin), precision, quantize, lambda *_: None)
        output.mkdir()
        return write_package(Path(twin), output, OnnxConfig(), lambda *_: None).lowering


@dataclass
class Result:
    """Seconds by batch, the last hidden state of the compared batch, or why it did not run."""

    seconds: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})
    versions: list[str] = field(default_factory=list)
    note: str = ""
    shown: np.ndarray | None = None
    left_out: str = ""

    def median(self, batch: int) -> float:
        return statistics.median(self.seconds[batch])


Results = dict[str, Result]


def race(contenders: list[Contender], threads: int, rounds: int, folder: Path) -> Results:
    """Contenders that take turns on the same requests, after a start that is not counted."""
    results: Results = {contender.name: Result() for contender in contenders}
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for contender in contenders:
            result = results[contender.name]
            try:
                own = stack.enter_context(closing(Running(contender, threads, folder, SCRIPT)))
                result.versions, result.note = own.hello["versions"], own.hello["note"]
                result.shown = np.array(own.ask(request(max(BATCHES), 0, padded=True))[OUTPUT])
                running[contender.name] = own
            except EngineError as error:
                result.left_out = str(error)
        names = list(running)
        for number in range(rounds):
            at = number % len(names)
            for name in [*names[at:], *names[:at]]:
                for batch in BATCHES:
                    time.sleep(0.05)  # until the threads of the engine before have stopped spinning
                    found = running[name].ask(request(batch, 1 + number, padded=False))
                    results[name].seconds[batch].append(found["seconds"])
            print(f"  round {number + 1} of {rounds}", file=sys.stderr)
    return results


def request(rows: int, seed: int, padded: bool) -> dict[str, Any]:
    return {"rows": rows, "length": LENGTH, "seed": seed, "padded": padded}


def compare_outputs(results: Results) -> dict[str, float]:
    """Largest difference from our last hidden state at real tokens, relative to the largest number there.

    Raises:
        SystemExit: a rival computes another model.
    """
    ours = results[OURS].shown
    assert ours is not None
    real = np.ones(ours.shape[:2], bool)
    if ours.shape[1] == LENGTH:
        real = np.arange(LENGTH) < LENGTH - 10 * np.arange(len(ours))[:, None]
    errors = {
        name: float(np.abs(result.shown - ours)[real].max() / np.abs(ours[real]).max())
        for name, result in results.items()
        if result.shown is not None and name in MIXTURES and name != OURS
    }
    wrong = {name: error for name, error in errors.items() if not error <= MOST_RELATIVE_ERROR}
    if wrong:
        raise SystemExit(
            f"outputs in float32 differ from dense2moe's by {wrong}; must be at most {MOST_RELATIVE_ERROR}: not the "
            "same model"
        )
    return errors


@dataclass(frozen=True)
class Rival:
    """What makes an engine's file, and of which checkpoint; without a kind it runs the checkpoint."""

    engine: str
    kind: Mapping[Variant, str]
    is_dense: bool = False


RIVALS = {
    EXPORTER: Rival("onnx", {"float32": "onnx", "int8": "onnx-int8"}),
    EXPORTER_DENSE: Rival("onnx", {"float32": "onnx"}, is_dense=True),
    OPENVINO: Rival("openvino", {"float32": "openvino", "int8": "openvino-int8", "int4": "openvino-int4"}),
    TORCH: Rival("torch-eager", {"float32": ""}),
    TORCH_GROUPED: Rival("torch-grouped", {"float32": ""}),
}
_NOT_SO = {
    EXPORTER: "its quantizer has no 4 bits",
    EXPORTER_DENSE: "float32 alone",
    TORCH: "float32 alone",
    TORCH_GROUPED: "float32 alone",
}


def find_rivals(
    precision: Variant, checkpoints: Checkpoints, files: Path, openvino: Path | None
) -> tuple[list[Contender], dict[str, str]]:
    """Who runs in a precision, and why the others do not."""
    contenders, left_out = [], {}
    for name, rival in RIVALS.items():
        kind, python = rival.kind.get(precision), Path(sys.executable)
        if kind is None:
            left_out[name] = _NOT_SO[name]
            continue
        if name == OPENVINO:
            if openvino is None:
                left_out[name] = "no --openvino"
                continue
            if missing := imports(openvino, "torch, transformers, openvino, nncf"):
                left_out[name] = f"--openvino: {missing}"
                continue
            python = openvino
        path = checkpoints.wide if rival.is_dense else checkpoints.mixture
        try:
            if kind:
                print(f"  {name}", file=sys.stderr)
                command = (python, Path(__file__).resolve().with_name(SCRIPT), "make", kind, path)
                log = files / f"make-{kind}.log"
                path = made(
                    files / f"{kind}{'-dense' if rival.is_dense else ''}",
                    lambda partial, command=command, log=log: run_child((*command, partial), log),
                )
            contenders.append(Contender(name, python, path, rival.engine))
        except EngineError as error:
            left_out[name] = str(error)
    return contenders, left_out


@dataclass
class Outcome:
    """One model, raced: results by precision and engine, and the errors in float32."""

    model: Model
    results: dict[Variant, Results]
    errors: dict[str, float]


def run_model(model: Model, arguments: argparse.Namespace, scratch: Path, cache: Path) -> Outcome:
    files = cache / model.name
    files.mkdir(exist_ok=True)
    print(f"{model.name}: checkpoints", file=sys.stderr)
    checkpoints = make_checkpoints(model, files)
    outcome = Outcome(model, {}, {})
    for precision in arguments.precision or PRECISIONS:
        print(f"{model.name}, {precision}: export", file=sys.stderr)
        package, dense = scratch / "package", scratch / "dense-package"
        lowering = export_package(checkpoints.mixture, package, precision)
        export_package(checkpoints.without_experts, dense, precision)
        this = Path(sys.executable)
        ours = [Contender(OURS, this, package, "dense2moe"), Contender(DENSE, this, dense, "dense2moe")]
        rivals, left_out = find_rivals(precision, checkpoints, files, arguments.openvino)
        results = race([*ours, *rivals], arguments.threads, arguments.rounds, scratch)
        results[OURS].note = f"lowering {lowering}"
        for name in (OURS, DENSE):
            if results[name].left_out:
                raise SystemExit(f"{model.name}, {precision}, {name}: {results[name].left_out}")
        if precision == "float32":
            outcome.errors = compare_outputs(results)
        outcome.results[precision] = results | {name: Result(left_out=reason) for name, reason in left_out.items()}
        for path in (package, dense):
            shutil.rmtree(path)
    return outcome


def print_times(outcome: Outcome, console: Console) -> None:
    for batch in BATCHES:
        table = Table(title=f"{outcome.model.name}, {NUM_LAYERS} layers, {batch} {outcome.model.row}")
        for heading in ("precision", "engine", "ms", "its time / dense2moe's", ""):
            table.add_column(heading, justify="right" if heading in ("ms", "its time / dense2moe's") else "left")
        for precision, results in outcome.results.items():
            ours = results[OURS].median(batch)
            for name, result in results.items():
                if result.left_out:
                    table.add_row(precision, name, "—", "", result.left_out)
                    continue
                seconds = result.median(batch)
                table.add_row(precision, name, f"{1e3 * seconds:,.1f}", f"{seconds / ours:.2f} ×", result.note)
            table.add_section()
        console.print(table)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in outcome.errors.items())
    print(f"Largest difference from dense2moe's last hidden state in float32: {errors or 'nobody to compare with'}")


def print_targets(outcome: Outcome) -> None:
    print(f"\nTargets, {outcome.model.name}:")
    for batch in BATCHES:
        for precision, results in outcome.results.items():
            ours, what = results[OURS].median(batch), f"{precision}, {batch} {outcome.model.row}"
            rivals = [name for name in MIXTURES if name != OURS and name in results and not results[name].left_out]
            if rivals:
                best = min(rivals, key=lambda name: results[name].median(batch))
                judge(f"{what}, time of the fastest rival ({best})", results[best].median(batch) / ours, 1.0, True)
            if precision == "float32":
                judge(
                    f"{what}, time over the dense model's",
                    ours / results[DENSE].median(batch),
                    MOST_AGAINST_DENSE,
                    False,
                )
            if precision == "int8" and "float32" in outcome.results:
                other = outcome.results["float32"][OURS].median(batch)
                judge(f"{what}, time of float32", other / ours, 1.0, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="this one alone")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="these alone")
    parser.add_argument(
        "--openvino", type=Path, metavar="PYTHON", help="a Python with torch, transformers, openvino and nncf"
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cache", type=Path, help="keep the checkpoints and the rivals' files in this directory, and use those there"
    )
    arguments = parser.parse_args()
    if arguments.openvino and not os.access(arguments.openvino, os.X_OK):
        raise SystemExit(f"{arguments.openvino}: not an executable; must be the path of a Python")
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        cache = arguments.cache.resolve() if arguments.cache else scratch / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            if arguments.model in (None, model.name):
                before = os.getloadavg()[0]
                outcome = run_model(model, arguments, scratch, cache)
                print_machine(outcome, arguments.threads)
                print(f"Load average of a minute: {before:.1f} before, {os.getloadavg()[0]:.1f} after")
                print_times(outcome, console)
                print_targets(outcome)


if __name__ == "__main__":
    main()
