"""Gates beside each other: the same mixture, data, tokens and rates; only how tokens choose experts differs.

    python benchmarks/gates.py [--gates NAME ...] [--seeds 0 1 2] [--steps N] [--cache DIRECTORY]

The model, the text and the rates are those of `recipes/quickstart.yaml`: a dense model of 1 M parameters meets four
kinds of text that it has never seen, and becomes a mixture of ours of 4 experts, whose routers are drawn and told the
domains at first. For each gate and seed a recipe is
run by `dense2moe run` up to parity. Told are the loss on held-out text with the weights that were best on the
validation split, the mean number of experts of a token and the load of the fullest expert at the end of training (1 /
experts is even), the mean over layers, and the speed of the ONNX package in float32 relative to top-2's. Speeds of
seeds are medians; gates of one seed run one after the other, so compare speeds of an idle machine alone.

Everything is kept in the cache, so a killed benchmark goes on where it was.
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
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
GATES: dict[str, dict[str, Any]] = {
    "top-2": {},
    "top-1": {"k": 1},
    "all experts": {"k": 4},
    "sigmoid, top-2": {"gate": {"score": "sigmoid"}},
    "noisy top-2": {"finetune": {"router_noise": 0.25}},
    "threshold 0.25": {"k": 4, "gate": {"choice": "threshold", "threshold": 0.25}},
    "sigmoid threshold 0.5": {"k": 4, "gate": {"score": "sigmoid", "choice": "threshold", "threshold": 0.5}},
    "top-p 0.6": {"k": 4, "gate": {"choice": "top-p", "p": 0.6}},
    "top-p 0.6, sparsity 0.01": {
        "k": 4,
        "gate": {"choice": "top-p", "p": 0.6},
        "finetune": {"sparsity_coefficient": 0.01},
    },
    "skip below 0.5": {"gate": {"choice": "skip", "skip_below": 0.5}},
    "relu": {"k": 4, "gate": {"score": "relu", "choice": "threshold"}},
    "relu, sparsity 0.01": {
        "k": 4,
        "gate": {"score": "relu", "choice": "threshold"},
        "finetune": {"sparsity_coefficient": 0.01},
    },
}
"""What differs from the quickstart: experts a token at most, the gate, and settings of training."""


def write_recipe(name: str, seed: int, steps: int, cache: Path) -> Path:
    """The recipe of one gate and seed; JSON is YAML."""
    recipe: dict[str, Any] = YAML(typ="safe").load(ROOT / "recipes/quickstart.yaml")
    changed = GATES[name]
    recipe["source"] = str(ROOT / "recipes" / recipe["source"])
    recipe["seed"] = seed
    recipe["upcycle"] |= {
        "target": "mixture",
        "num_experts_per_tok": changed.get("k", 2),
        "router": {"kind": "normal", "logit_std": 2.0},  # rows of our own mixtures are drawn
    }
    if "gate" in changed:
        recipe["upcycle"]["gate"] = changed["gate"]
    recipe["finetune"] |= {"steps": steps, "eval_steps": max(1, steps // 4), "control": False}
    del recipe["finetune"]["control_rates"]
    recipe["finetune"] |= changed.get("finetune", {})
    recipe |= {"variants": ["float32"], "parity": {}}
    del recipe["quantize"]
    path = cache / f"{name.replace(' ', '-').replace(',', '')}-{seed}.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def measure(recipe: Path, cache: Path) -> dict[str, float]:
    """Loss, experts a token, the fullest load and tokens a second of a finished run."""
    directory = cache / recipe.stem
    command = [sys.executable, "-m", "dense2moe", "run", str(recipe), "--workdir", str(directory), "--until", "parity"]
    if subprocess.run(command, stdout=sys.stderr).returncode not in (0, 1):  # 1: parity was broken, which is told
        sys.exit(f"{' '.join(command)} failed")
    if not list(directory.glob("parity-*")):
        sys.exit(f"{' '.join(command)} wrote no package")
    manifests = (json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*/manifest.json"))
    facts = {each["label"]: each["facts"] for each in manifests}
    (history,) = directory.glob("finetune-*/history.jsonl")
    steps = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    layers = [step["layers"] for step in steps if step["model"] == "fine-tuned" and step["layers"]][-1]
    parity = facts["parity-float32"]
    return {
        "loss": facts["finetune"]["evaluations"]["fine-tuned"]["loss"],
        "visits": statistics.mean(layer["visits"] for layer in layers),
        "fullest": statistics.mean(max(layer["load"]) for layer in layers),
        "speed": parity["providers"]["CPUExecutionProvider"]["prefill_tokens_per_second"],
        "passed": float(parity["passed"]),
    }


def tell(values: list[float], digits: int) -> str:
    """Mean and spread."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gates", nargs="+", choices=list(GATES), default=list(GATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160, help="steps of training, of 8 blocks of 256 tokens")
    parser.add_argument("--cache", type=Path, default=Path("runs/gates"), help="where every result is kept")
    arguments = parser.parse_args()
    cache = (arguments.cache / f"{arguments.steps}-steps").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in dict.fromkeys(["top-2", *arguments.gates])}
    for seed in arguments.seeds:
        for name, results in found.items():
            results.append(measure(write_recipe(name, seed, arguments.steps, cache), cache))
            print(f"seed {seed}, {name}: {results[-1]}", file=sys.stderr, flush=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{datetime.date.today()}, {machine}; {arguments.steps} steps, seeds {arguments.seeds}\n")
    print("| gate | loss, nats | experts a token | fullest load | ONNX tokens/s, of top-2's | parity |")
    print("|---|--:|--:|--:|--:|---|")
    usual = statistics.median(each["speed"] for each in found["top-2"])
    for name, results in found.items():
        loss, visits, fullest = (
            tell([each[key] for each in results], digits)
            for key, digits in (("loss", 4), ("visits", 2), ("fullest", 2))
        )
        speed = statistics.median(each["speed"] for each in results) / usual
        passed = sum(each["passed"] for each in results)
        print(f"| {name} | {loss} | {visits} | {fullest} | {speed:.2f} | {passed:.0f} of {len(results)} |")


if __name__ == "__main__":
    main()
