"""What rounding costs.

Perplexity and routing of a fine-tuned mixture under every method of ours, and under the quantizers of others.
    python benchmarks/quantization.py [--model embedded|stories260k|wikitext] [--data DIRECTORY] [--cache DIRECTORY]
        [--bits 4 8] [--block-size 32] [--blocks 64] [--threads N] [--llama-cpp PYTHON] [--gptqmodel PYTHON]
        [--markdown]

Three mixtures, each fine-tuned by a recipe once and kept in the cache, as are all outcomes, so that a killed benchmark
goes on where it was:

- embedded: the quickstart's.
- stories260k: the Llama of 260 k parameters in `--data` and TinyStories, by the quickstart's recipe. No block divides
  its FFN width of 172.
- wikitext: 14 M parameters, 8 experts of which 2 are chosen, from a Llama that is trained here on WikiText-2 in
  `--data`.

All methods quantize the same matrices, those of experts and attention, in blocks of the same size; router, embedding
and head stay in float32. A recipe's defaults alone have 8 bits in attention, embedding and head; MB are those of
experts and attention. Products read activations in float32, so that the weights alone make the difference; only
llama.cpp's engine rounds them to 8 bits. Quantizers of this environment rewrite the float32 package that we wrote
(`rivals.py`); the others, each in a Python of its own (`quantizers.py`), write a checkpoint of what their integers
stand for, which is exported in float32. All that calibrate read the same tokens.

Against float32 on held-out text: perplexity, with the standard error over blocks of its increase; KL in nats; tokens
whose most likely successor is the same; tokens that meet the same experts in the worst layer, in the mean of all, and
in every one; the KL of those that do in every one, of the others, and of all tokens when every router's logits are
float32's. `rounding` is what the others are measured by: its loss above float32's is 1.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from judging import Judge, Outcome
from quality import Pretraining, wikitext_data, wikitext_dense
from rich.console import Console
from rich.table import Table
from rivals import FOUR_BITS_ALONE, ONNXRUNTIME, OTHERS, mean_squares, run_other, write_onnxruntime
from ruamel.yaml import YAML
from transformers.utils import logging

from dense2moe.convert.artifact.keys import code_digest
from dense2moe.export.blocks import choose_blocks
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.data.blocks import read_blocks

ROOT = Path(__file__).resolve().parent.parent
ROUNDING, DEFAULT, RECIPE = "rounding", "GPTQ", "GPTQ, a recipe's defaults"
OURS: dict[str, dict[str, Any]] = {
    ROUNDING: {"method": "round"},
    "searched scales": {"method": "search"},
    DEFAULT: {"method": "gptq"},
    "searched scales, zero points": {"method": "search", "zero_points": True},
    "GPTQ, zero points": {"method": "gptq", "zero_points": True},
    "GPTQ, all experts see all tokens": {"method": "gptq", "calibrate_all_experts": True},
    "GPTQ + router correction": {"method": "gptq", "correct_routers": True},
    "AWQ + searched scales": {"method": "search", "input_scaling": "awq"},
    "AWQ + GPTQ": {"method": "gptq", "input_scaling": "awq"},
    RECIPE: {"method": "gptq", "attention_bits": 8, "embedding_bits": 8},
    # the size of llama.cpp's formats, whose scales have 16 bits
    "GPTQ, blocks of 64": {
        "method": "gptq",
        "block_size": 64,
    },
}
VARIANTS: dict[int, Variant] = {4: "int4", 8: "int8", 32: "float32"}
CALIBRATION_TOKENS = 32768
# the largest increase of perplexity by the default method, with the bits that a recipe has by default
TARGETS = {
    8: 0.001,
    4: 0.015,
}
SHARE_OF_ROUNDING = 2 / 3  # the largest part of rounding's loss that it may have with 4 bits
HEADINGS = (
    "bits",
    "method",
    "perplexity",
    "loss",
    "KL",
    "top-1",
    "routing: worst",
    "mean",
    "all",
    "KL same",
    "KL flipped",
    "KL forced",
    "MB",
    "bits/weight",
)
Outcomes = dict[tuple[int, str], Outcome | str]
"""By bits and method; in words why there is none."""


def fine_tune(model: str, data: Path, cache: Path) -> tuple[Path, Path]:
    """Run the recipe up to fine-tuning, or find that done; returns the directories of the mixture and of its data."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    cache.mkdir(parents=True, exist_ok=True)
    if model != "embedded":
        settings = YAML(typ="safe").load(recipe)
        if model == "stories260k":
            files = {
                split: [str(data / "tinystories" / f"{name}.txt")]
                for split, name in (("train", "train"), ("test", "validation"))
            }
            settings["source"] = str(data / "stories260k")
            settings["data"]["source"] = {"kind": "text", **files, "separator": "<|endoftext|>"}
        else:
            text = data / "wikitext-2"
            dense = wikitext_dense(
                text,
                cache / "dense",
                Pretraining(vocab_size=4096, hidden_size=256, intermediate_size=512, autocast=True),
            )
            settings |= {"source": str(dense), "data": wikitext_data(text).model_dump(mode="json", exclude_none=True)}
            settings["upcycle"] |= {"num_experts": 8, "experts": {"noise": 0.1}}
            settings["finetune"] |= {"steps": 240, "eval_steps": 120, "learning_rate": 1e-3, "control": False}
        recipe = cache / "recipe.yaml"
        recipe.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "dense2moe",
        "run",
        str(recipe),
        "--until",
        "finetune",
        "--workdir",
        str(cache / "run"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    artifacts = json.loads((cache / "run" / "run.json").read_text(encoding="utf-8"))["artifacts"]
    return cache / "run" / artifacts["finetune"], cache / "run" / artifacts["data"]


def write_ours(
    mixture: Path, folder: Path, bits: int, config: QuantizeConfig, blocks: torch.Tensor | None = None
) -> Path:
    """The package of one of our methods."""
    twin, package = folder / "twin", folder / "package"
    for path in (twin, package):
        path.mkdir(parents=True)
    quantize_checkpoint(mixture, twin, VARIANTS[bits], config, lambda *_: None, QuantizeInputs(blocks=blocks))
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=32), lambda *_: None)
    return package


class Bench:
    """One mixture and its text, blocks [N, S] to calibrate on and to judge by. Outcomes are kept as they come."""

    def __init__(self, mixture: Path, data: Path, folder: Path, arguments: argparse.Namespace) -> None:
        train, self.test = read_blocks(data, "train"), choose_blocks(read_blocks(data, "test"), arguments.blocks)
        self.calibration = choose_blocks(train, CALIBRATION_TOKENS // train.shape[1])
        self.mixture, self.folder, self.arguments = mixture, folder, arguments
        self.settings = {"block_size": arguments.block_size, "attention_bits": "variant", "embedding_bits": 16}
        self.kept = mixture.parent.parent / "outcomes"
        self.kept.mkdir(exist_ok=True)
        beside = (
            Path(__file__).resolve().with_name(f"{name}.py").read_text(encoding="utf-8")
            for name in ("judging", "rivals", "quantizers")
        )
        self.code = (code_digest("export"), *beside)

    @cached_property
    def floats(self) -> Path:
        return write_ours(self.mixture, self.folder / "float32", 32, QuantizeConfig(**self.settings))

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.floats, self.test, self.arguments.threads)

    def measure(self) -> Iterator[tuple[int, str, Outcome | str]]:
        """Every method with every number of bits, float32 first."""
        yield from self.remember(
            32, "float32", None, lambda folder: [("float32", self.judge.compare_package(self.floats, folder))]
        )
        for bits in self.arguments.bits:
            for name, fields in OURS.items():
                config = QuantizeConfig(**{**self.settings, **fields})
                yield from self.remember(
                    bits, name, config, lambda folder, b=bits, n=name, c=config: self.try_ours(b, n, c, folder)
                )
            for name in ONNXRUNTIME:
                yield from self.remember(
                    bits, name, ort.__version__, lambda folder, b=bits, n=name: self.try_onnxruntime(b, n, folder)
                )
            for name, other in OTHERS.items():
                if bits in other.bits and (python := getattr(self.arguments, other.python)) is not None:
                    yield from self.remember(
                        bits, name, python, lambda folder, b=bits, n=name: self.try_other(b, n, folder)
                    )

    def remember(
        self, bits: int, name: str, what: object, attempt: Callable[[Path], list[tuple[str, Outcome | str]]]
    ) -> Iterator[tuple[int, str, Outcome | str]]:
        """The outcomes of one method, from the cache if the same was tried with the same code.

        What failed is tried anew.
        """
        key = repr((what, self.settings, self.code, self.mixture.name, len(self.test)))
        path = self.kept / f"{bits} {name.replace('/', ' ')} {hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        if path.exists():
            found = [(label, Outcome(**fields)) for label, fields in json.loads(path.read_text(encoding="utf-8"))]
        else:
            found = attempt(self.folder / f"{bits} {name} judged")
            if all(isinstance(outcome, Outcome) for _, outcome in found):
                path.write_text(json.dumps([(label, asdict(outcome)) for label, outcome in found]), encoding="utf-8")
        yield from ((bits, label, outcome) for label, outcome in found)

    def try_ours(self, bits: int, name: str, config: QuantizeConfig, folder: Path) -> list[tuple[str, Outcome | str]]:
        package = write_ours(self.mixture, self.folder / f"{bits} {name}", bits, config, self.calibration)
        return [(name, self.judge.compare_package(package, folder))]

    def try_onnxruntime(self, bits: int, name: str, folder: Path) -> list[tuple[str, Outcome | str]]:
        if bits == 8 and name in FOUR_BITS_ALONE:
            return [(name, "4 bits alone")]
        size = self.arguments.block_size
        package = write_onnxruntime(
            self.floats, self.folder / f"{bits} {name}", bits, size, ONNXRUNTIME[name](bits, size)
        )
        return [(name, self.judge.compare_package(package, folder))]

    @cached_property
    def inputs(self) -> dict[str, Path]:
        """The files that the quantizers of others read."""
        paths = {name: self.folder / name for name in ("calibration.npy", "held-out.npy", "importance.npz")}
        np.save(paths["calibration.npy"], self.calibration.numpy())
        np.save(paths["held-out.npy"], self.test.numpy())
        np.savez(paths["importance.npz"], **mean_squares(self.floats, self.folder / "importance", self.calibration))
        return {name.split(".")[0]: path for name, path in paths.items()}

    def try_other(self, bits: int, name: str, folder: Path) -> list[tuple[str, Outcome | str]]:
        """Of llama.cpp its weights, as all others' are judged, and its engine on them."""
        other, made, arguments = OTHERS[name], self.folder / f"{bits} {name}", self.arguments
        facts = run_other(
            other,
            getattr(arguments, other.python),
            self.mixture,
            made,
            bits,
            arguments.block_size,
            arguments.threads,
            self.inputs,
        )
        if isinstance(facts, str):
            return [(name, facts)]
        package = write_ours(made, self.folder / f"{bits} {name} package", 32, QuantizeConfig())
        label = f"{name} ({', '.join(facts['kinds'])})" if len(facts["kinds"]) > 1 else name
        found: list[tuple[str, Outcome | str]] = [
            (label, self.judge.compare_package(package, folder, facts["num_bytes"]))
        ]
        if (made / "logits.npy").exists():
            logits = torch.from_numpy(np.load(made / "logits.npy")).log_softmax(-1)
            found.append((f"{name}, its engine", self.judge.compare(list(logits.split(4)), facts["num_bytes"])))
        return found


def format_rows(outcomes: Outcomes) -> list[list[str]]:
    base = outcomes[32, "float32"]
    assert isinstance(base, Outcome)
    rows = []
    for (bits, name), found in outcomes.items():
        if isinstance(found, str):
            rows.append([str(bits), f"{name}: {found}", *[""] * (len(HEADINGS) - 2)])
            continue
        perplexity, share = f"{np.exp(found.loss):.3f}", ""
        rounding = outcomes.get((bits, ROUNDING))
        if isinstance(rounding, Outcome):
            perplexity += f" ({np.expm1(found.loss - base.loss):+.2%} ± {found.increase_error:.2%})"
            share = f"{(found.loss - base.loss) / (rounding.loss - base.loss):.2f}"
        layers = found.routing
        routing = [None] * 3 if layers is None else [min(layers), sum(layers) / len(layers), found.same]
        row = [str(bits), name, perplexity, share, f"{found.kl:.1e}", f"{found.top1:.2%}"]
        row += ["—" if value is None else f"{value:.2%}" for value in routing]
        row += [
            "—" if value is None else f"{value:.1e}" for value in (found.kl_same, found.kl_flipped, found.kl_forced)
        ]
        rows.append([*row, f"{found.num_bytes / 1e6:.2f}", f"{32 * found.num_bytes / base.num_bytes:.2f}"])
    return rows


def judge_targets(outcomes: Outcomes) -> Iterator[str]:
    base = outcomes[32, "float32"]
    for bits, limit in TARGETS.items():
        usual, found, rounding = (outcomes.get((bits, name)) for name in (RECIPE, DEFAULT, ROUNDING))
        if (
            isinstance(base, Outcome)
            and isinstance(usual, Outcome)
            and isinstance(found, Outcome)
            and isinstance(rounding, Outcome)
        ):
            increase, alone = (float(np.expm1(outcome.loss - base.loss)) for outcome in (usual, found))
            verdict = "met" if increase <= limit else "MISSED"
            yield (
                f"int{bits}: {increase:+.3%} by {RECIPE}, at most {limit:.1%} wanted: {verdict}; {alone:+.3%} with "
                f"attention in {bits} bits too"
            )
            if bits == 4:
                share = (found.loss - base.loss) / (rounding.loss - base.loss)
                verdict = "met" if share <= SHARE_OF_ROUNDING else "MISSED"
                yield f"int4: {share:.2f} of rounding's loss, at most {SHARE_OF_ROUNDING:.2f} wanted: {verdict}"


def print_table(title: str, rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        print(f"{title}\n\n| {' | '.join(HEADINGS)} |\n|--:|---|{'--:|' * (len(HEADINGS) - 2)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = Table(title=title)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=220).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "stories260k", "wikitext"), default="embedded")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data",
        help="directory of stories260k, tinystories and wikitext-2",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/quantization"), help="where mixtures and outcomes are kept"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8))
    parser.add_argument("--block-size", type=int, default=32, choices=(16, 32, 64, 128))
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", type=Path, help="a Python with llama-cpp-python, gguf and safetensors")
    parser.add_argument("--gptqmodel", type=Path, help="a Python with gptqmodel")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    mixture, data = fine_tune(arguments.model, arguments.data.resolve(), (arguments.cache / arguments.model).resolve())
    outcomes: Outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(mixture, data, Path(scratch), arguments)
        for bits, name, found in bench.measure():
            outcomes[bits, name] = found
            print(
                f"{bits} {name}: {found if isinstance(found, str) else f'{np.exp(found.loss):.4f}'}",
                file=sys.stderr,
                flush=True,
            )
    title = (
        f"{arguments.model}, {datetime.date.today()}, {bench.test.numel():,} held-out tokens, blocks of "
        f"{arguments.block_size}, "
    )
    title += f"onnxruntime {ort.__version__}, {os.cpu_count()} cores, {platform.machine()}"
    print_table(title, format_rows(outcomes), arguments.markdown)
    print("\n".join(judge_targets(outcomes)))


if __name__ == "__main__":
    main()
