"""Experts by domain: what they are worth beside the dense model, arm by arm, on text that it has never seen.

    python benchmarks/domains.py [--model DIRECTORY] [--texts DIRECTORY] [--seeds 3] [--cache DIRECTORY]
    python benchmarks/domains.py --crossing docs/results/crossing.svg

A dense model meets four domains: by default stories260k, and TinyStories, GSM8K, WikiText-2 and Banking77 (`--texts`).
Every arm gets the same tokens in all, those of its branches counted, and the same rates, so that arms differ in how the
experts come to be and how tokens find them. The loss is of the weights with the best validation loss, on held-out
documents, in nats a token, the mean over domains; beside it the mutual information of expert and domain, the mean over
layers. Domains are of equal size. Where an arm has branches, the dense model was first continued on each domain by
itself, and what is no expert is the mean of the branches.

With `--crossing` dense models and mixtures are trained for several lengths, each with a schedule of its own, and drawn
against tokens and against operations: where their curves cross the mixture overtakes.

Every result is kept in the cache as it comes, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from crossing import SERIES, crossing_arms, draw_crossing, print_crossing
from domain_arms import ARMS, Arm, Scale, measure, prepare, read_documents
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent


def digest(*settings: object) -> str:
    """What a cached result was made with."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def keep_result(cache: Path, model: Path, data: Path, scale: Scale, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """An arm's result, from the cache where it is there."""
    path = cache / f"{digest(model, data.name, scale)} {arm} {seed}.json"
    if not path.is_file():
        fresh = path.with_suffix(".partial")
        fresh.write_text(json.dumps(measure(model, data, arm, scale, seed)), encoding="utf-8")
        fresh.rename(path)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    mean = statistics.mean(result["losses"].values())
    print(f"seed {seed}, {name}: {mean:.4f} ({result['cpu_seconds']:.0f} s)", file=sys.stderr, flush=True)
    return result


def print_machine(model: Path, scale: Scale) -> None:
    """When, where and how it was measured."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{datetime.date.today()}, {machine}, float32; {model.name}; {scale}\n")


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    names = list(next(iter(results.values()))[0]["losses"])
    print(f"| arm | nats, mean | by seed | {' | '.join(names)} | information | CPU s |")
    print(f"|---|--:|---|{'--:|' * len(names)}--:|--:|")
    dense = results["dense continued"][0]["before"]
    cells = " | ".join(f"{dense[name]:.3f}" for name in names)
    print(f"| dense, as it comes | {statistics.mean(dense.values()):.4f} | | {cells} | | |")
    for arm, found in results.items():
        means = [statistics.mean(each["losses"].values()) for each in found]
        cells = " | ".join(f"{statistics.mean(each['losses'][name] for each in found):.3f}" for name in names)
        known = [each["information"] for each in found if each["information"] is not None]
        information = f"{statistics.mean(known):.2f}" if known else ""
        by_seed = ", ".join(f"{mean:.4f}" for mean in means)
        seconds = statistics.median(each["cpu_seconds"] for each in found)
        print(f"| {arm} | {statistics.mean(means):.4f} | {by_seed} | {cells} | {information} | {seconds:.0f} |")


def main() -> None:
    shared = ROOT.parent / "shared/data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=shared / "stories260k", help="the dense checkpoint")
    parser.add_argument("--texts", type=Path, default=shared, help="directory of the four data sets")
    parser.add_argument("--cache", type=Path, default=Path("runs/domains"), help="where every result is kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--crossing", type=Path, metavar="FILE", help="draw the crossing into an SVG or PNG file")
    parser.add_argument(
        "--series", nargs="+", default=list(SERIES), choices=list(SERIES), help="what --crossing compares with dense"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    arguments = parser.parse_args()
    if not (arguments.texts / "gsm8k").is_dir() or not arguments.model.is_dir():
        sys.exit(f"needs {arguments.model} and data sets in {arguments.texts}; give --model and --texts")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    scale = Scale(arguments.steps, arguments.batch_size, arguments.block_size, arguments.learning_rate)
    cache = arguments.cache.absolute()
    data = cache / f"data-{digest(arguments.model, arguments.texts, scale.block_size)}"
    if not (data / "data.json").is_file():
        data.mkdir(parents=True, exist_ok=True)
        prepare(arguments.model, read_documents(arguments.texts), data, scale.block_size)
    run = partial(keep_result, cache, arguments.model, data, scale)
    if arguments.crossing:
        arms = crossing_arms(arguments.series)
        found = {(name, length): run(f"{name} {length:g}", arm, 0) for (name, length), arm in arms.items()}
        print_machine(arguments.model, scale)
        print_crossing(found)
        draw_crossing(found, arguments.crossing)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.arms:
            results.setdefault(name, []).append(run(name, ARMS[name], seed))
    print_machine(arguments.model, scale)
    print_table(results)


if __name__ == "__main__":
    main()
