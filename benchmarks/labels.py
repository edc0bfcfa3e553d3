"""Labels on real data: a mixture beside the dense model that it was made of, and beside a plain script.

    python benchmarks/labels.py --model DIRECTORY --task {banking77,wnut17} [--seeds 0 1 2] [--steps N]

Banking77 (Casanueva et al. 2020) has questions to a bank with 77 intents, WNUT-17 (Derczynski et al. 2017) sentences
with six types of rare entities. For each seed a recipe is run by `dense2moe run`: it trains the mixture, the dense
model for the same steps, and the dense model for the mixture's operations. The plain script (`plain_trainer.py`)
trains the dense model by transformers' Trainer for the same steps at the same rates, with its own reading of the data
and its own scores; nothing of dense2moe is in it. The mixture of seed 0 is written to ONNX in float32 and int8, and
judged.

The figure is of the whole test split, with the weights that were best on the validation split. Everything is kept in
the cache, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("dense continued", "dense, same FLOPs", "fine-tuned")


@dataclass(frozen=True)
class Work:
    """A data set: its source in a recipe, and the scale of training on it."""

    source: dict[str, Any]
    figure: str
    block_size: int
    steps: int
    learning_rate: float


def list_works(texts: Path) -> dict[str, Work]:
    """The data sets by name."""
    banking, wnut = texts / "banking77", texts / "wnut17"
    return {
        "banking77": Work(
            {
                "kind": "table",
                "train": [str(banking / "train.csv")],
                "test": [str(banking / "test.csv")],
                "label": "category",
            },
            "accuracy",
            64,
            600,
            3e-4,
        ),
        "wnut17": Work(
            {
                "kind": "conll",
                "train": [str(wnut / "wnut17train.conll")],
                "validation": [str(wnut / "emerging.dev.conll")],
                "test": [str(wnut / "emerging.test.annotated")],
            },
            "entity F1",
            128,
            212,
            3e-4,
        ),
    }


def write_recipe(model: Path, name: str, work: Work, steps: int, seed: int, cache: Path) -> Path:
    """The recipe of one seed; JSON is YAML."""
    recipe = {
        "name": f"{name}-{seed}",
        "seed": seed,
        "source": str(model),
        "data": {"source": work.source, "block_size": work.block_size, "max_validation_examples": 500},
        "upcycle": {"num_experts": 4, "num_experts_per_tok": 2},
        "finetune": {
            "steps": steps,
            "warmup_steps": steps // 10,
            "eval_steps": steps // 3,
            "batch_size": 16,
            "learning_rate": work.learning_rate,
        },
        "variants": ["float32", "int8"],
    }
    path = cache / f"{name}-{seed}.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def run_recipe(recipe: Path, cache: Path, last: str) -> dict[str, Any]:
    """Facts of the finished stages, by artifact."""
    directory = cache / recipe.stem
    command = [sys.executable, "-m", "dense2moe", "run", str(recipe), "--workdir", str(directory), "--until", last]
    if subprocess.run(command, stdout=sys.stderr).returncode not in (0, 1):  # 1: parity was broken, which is told
        sys.exit(f"{' '.join(command)} failed")
    manifests = (json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*/manifest.json"))
    return {each["label"]: each["facts"] for each in manifests}


def run_plain(model: Path, name: str, work: Work, steps: int, seed: int, cache: Path) -> dict[str, Any]:
    """The plain script's result, from the cache where it is there."""
    path = cache / f"plain-{name}-{seed}.json"
    if not path.is_file():
        settings = {
            "model": str(model),
            "source": work.source,
            "most_tokens": work.block_size,
            "steps": steps,
            "learning_rate": work.learning_rate,
            "seed": seed,
            "output": str(path),
        }
        subprocess.run([sys.executable, str(ROOT / "benchmarks/plain_trainer.py"), json.dumps(settings)], check=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def tell(values: list[float]) -> str:
    """Mean and spread in points."""
    points = [100 * value for value in values]
    spread = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):.2f}{spread} | {', '.join(f'{value:.2f}' for value in points)}"


def main() -> None:
    shared = ROOT.parent / "shared/data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="an encoder, such as all-MiniLM-L6-v2")
    parser.add_argument("--task", required=True, choices=["banking77", "wnut17"])
    parser.add_argument("--texts", type=Path, default=shared, help="directory of the data sets")
    parser.add_argument("--cache", type=Path, default=Path("runs/labels"), help="where every result is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of training, of 16 examples")
    arguments = parser.parse_args()
    texts, model = arguments.texts.resolve(), arguments.model.resolve()
    if not (texts / arguments.task).is_dir() or not model.is_dir():
        sys.exit(f"needs {model} and {texts / arguments.task}; give --model and --texts")
    work = list_works(texts)[arguments.task]
    steps = arguments.steps or work.steps
    cache = (arguments.cache / f"{steps}-steps").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {"plain script": []}
    for seed in arguments.seeds:
        recipe = write_recipe(model, arguments.task, work, steps, seed, cache)
        facts = run_recipe(recipe, cache, "finetune" if seed else "parity")
        for arm in ARMS:
            found.setdefault(arm, []).append(facts["finetune"]["evaluations"][arm]["figures"][0]["value"])
        for label in ("parity-float32", "parity-int8"):
            if label in facts:
                figures = facts[label]["providers"]["CPUExecutionProvider"]["figures"]
                found.setdefault(f"ONNX {label.removeprefix('parity-')}", []).append(figures[0]["value"])
        found["plain script"].append(run_plain(model, arguments.task, work, steps, seed, cache)["figure"])
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{datetime.date.today()}, {machine}; {arguments.task}, {steps} steps of 16 examples\n")
    print(f"| model | {work.figure}, points | by seed |\n|---|--:|---|")
    for name, values in found.items():
        print(f"| {name} | {tell(values)} |")


if __name__ == "__main__":
    main()
