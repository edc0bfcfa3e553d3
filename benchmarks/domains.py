"""Experts by domain: what they are worth beside the dense model, arm by arm, on text that it has never seen.

    python benchmarks/domains.py [--model DIRECTORY] [--texts DIRECTORY] [--seeds 3] [--cache DIRECTORY]

A dense model meets four domains: by default stories260k, and TinyStories, GSM8K, WikiText-2 and Banking77 (`--texts`).
Every arm gets the same tokens in all, those of its branches counted, and the same rates, so that arms differ in how the
experts come to be and how tokens find them. The loss is of the weights with the best validation loss, on held-out
documents, in nats a token, the mean over domains; beside it the mutual information of expert and domain, the mean over
layers. Domains are of equal size. Where an arm has branches, the dense model was first continued on each domain by
itself, and what is no expert is the mean of the branches.

Every result is kept in the cache as it comes, so a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from dense2moe.upcycle.building.config import ExpertsConfig, MergingConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.hidden_states import read_routers
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.data.blocks import prepare_data, read_domains
from dense2moe.upcycle.data.config import DataConfig, DomainsData, TextData
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN, next_token_loss
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.domain_routing import measure_domains
from dense2moe.upcycle.training.evaluation import held_out_losses
from dense2moe.upcycle.training.flops import training_flops
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model

ROOT = Path(__file__).resolve().parent.parent
_SEPARATOR = "\n\x1e\n"  # no document has it
_TRAIN_CHARS, _TEST_CHARS = 1_300_000, 120_000  # of each domain: about the tokens that are trained on, read once


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens.

    router: how the router starts. num_experts: experts a layer; 0 is the dense model. equal_compute: the dense model
    gets the steps that take a mixture's operations. branch_share: of all tokens, those of the branches; merging: what
    becomes of all that is no expert. together: branches are not merged into a mixture, their weights are averaged
    (soup), or their predictions (ensemble).
    """

    router: str = "normal"
    domain_coefficient: float = 0.0
    balance_coefficient: float = 0.0
    num_experts: int = 4
    num_experts_per_tok: int = 2
    noise: float = 0.0
    equal_compute: bool = False
    branch_share: float = 0.0
    merging: str = "mean"
    router_steps: int = 0
    branch_rate: float = 1.0
    together: str = ""

    @property
    def start(self) -> RouterConfig:
        """How the router starts; logits of rows from data are spread more, as they mean something."""
        return RouterConfig.model_validate({"kind": self.router, "logit_std": 1.0 if self.router == "normal" else 2.0})


ARMS = {
    "dense continued": Arm(num_experts=0),
    "dense continued, equal compute": Arm(num_experts=0, equal_compute=True),
    "copies, random router, balance": Arm(balance_coefficient=0.01),
    "copies + noise 0.1, random router, balance": Arm(balance_coefficient=0.01, noise=0.1),
    "copies, random router, domain loss": Arm(domain_coefficient=0.1),
    "copies, prototypes, domain loss": Arm("prototypes", 0.1),
    "copies, ridge router": Arm("ridge"),
    "copies, ridge router, domain loss": Arm("ridge", 0.1),
    "copies, ridge router, domain loss, 8 experts": Arm("ridge", 0.1, num_experts=8),
    "copies, ridge router, domain loss, top-1": Arm("ridge", 0.1, num_experts_per_tok=1),
    "branches of a tenth, ridge router, domain loss": Arm("ridge", 0.1, branch_share=0.1),
    "branches of a quarter, random router, balance": Arm(balance_coefficient=0.01, branch_share=0.25),
    "branches of a quarter, prototypes, domain loss": Arm("prototypes", 0.1, branch_share=0.25),
    "branches of a quarter, ridge router, domain loss": Arm("ridge", 0.1, branch_share=0.25),
    "branches of a quarter, trunk of the base": Arm("ridge", 0.1, branch_share=0.25, merging="base"),
    "branches of a quarter, 8 experts": Arm("ridge", 0.1, num_experts=8, branch_share=0.25),
    "branches of a quarter, router alone at first": Arm("ridge", 0.1, branch_share=0.25, router_steps=40),
    "branches of a quarter at a third of the rate": Arm("ridge", 0.1, branch_share=0.25, branch_rate=1 / 3),
    "branches of a quarter, averaged": Arm(branch_share=0.25, together="soup"),
    "branches of a quarter, ensembled": Arm(branch_share=0.25, together="ensemble"),
}


@dataclass(frozen=True)
class Scale:
    """How long and how fast every arm trains; a step is `batch_size` blocks of `block_size` tokens."""

    steps: int
    batch_size: int
    block_size: int
    learning_rate: float

    @property
    def finetune(self) -> FinetuneConfig:
        """The settings that arms share."""
        return FinetuneConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            router_learning_rate=self.learning_rate,
            warmup_steps=min(20, self.steps // 4),
            eval_steps=max(1, self.steps // 8),
            patience=99,
            precision="float32",
        )


def quiet(what: str, done: int, total: int) -> None:
    pass


def read_documents(texts: Path) -> dict[str, dict[str, list[str]]]:
    """Documents of each domain, of its training and of its test files."""

    def stories(file: str, between: str) -> list[str]:
        return (texts / "tinystories" / file).read_text(encoding="utf-8").split(between)

    def maths(file: str) -> list[str]:
        lines = (texts / "gsm8k" / file).read_text(encoding="utf-8").splitlines()
        return [f"{each['question']}\n{each['answer']}" for each in map(json.loads, lines)]

    def articles(file: str) -> list[str]:
        return re.split(r"\n(?= = [^=])", (texts / "wikitext-2" / file).read_text(encoding="utf-8"))

    def questions(file: str) -> list[str]:
        with (texts / "banking77" / file).open(encoding="utf-8", newline="") as lines:
            rows = [f"{row['text'].strip()} ({row['category']})" for row in csv.DictReader(lines)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()  # they come by category
        return ["\n".join(rows[place] for place in order[start : start + 20]) for start in range(0, len(order), 20)]

    whole = stories("train.txt", "<|endoftext|>")
    return {
        "stories": {"train": whole[: len(whole) * 9 // 10], "test": whole[len(whole) * 9 // 10 :]},
        "maths": {"train": maths("train.jsonl"), "test": maths("test.jsonl")},
        "articles": {"train": articles("train.txt"), "test": articles("test.txt")},
        "banking": {"train": questions("train.csv"), "test": questions("test.csv")},
    }


def take(documents: list[str], num_chars: int) -> Iterator[str]:
    """Documents from the first on, until there are so many characters."""
    for document in documents:
        if num_chars <= 0:
            return
        yield document.strip()
        num_chars -= len(document)


def prepare(model: Path, documents: dict[str, dict[str, list[str]]], data: Path, block_size: int) -> None:
    """Blocks of every domain, of about equal numbers; validation is half of the test documents, and test the other."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for name, splits in documents.items():
            chosen = {
                "train": list(take(splits["train"], _TRAIN_CHARS)),
                "validation": list(take(splits["test"][0::2], _TEST_CHARS)),
                "test": list(take(splits["test"][1::2], _TEST_CHARS)),
            }
            for split, found in chosen.items():
                (Path(folder) / f"{name}-{split}.txt").write_text(_SEPARATOR.join(found), encoding="utf-8")
            files = {split: (f"{name}-{split}.txt",) for split in chosen}
            sources[name] = TextData(kind="text", separator=_SEPARATOR, **files)  # type: ignore[arg-type]
        source = DomainsData(kind="domains", domains=sources)
        config = DataConfig(source=source, block_size=block_size, max_validation_tokens=16_384, max_test_tokens=65_536)
        prepare_data(model, data, config, Path(folder), quiet)


def measure(model: Path, data: Path, arm: Arm, scale: Scale, seed: int) -> dict[str, Any]:
    """Make one arm's model, train it, and measure it."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        branches = train_branches(model, data, arm, scale, seed, place) if arm.branch_share else {}
        if arm.together:
            losses = measure_together(branches, data, arm.together)
            return {"losses": losses, "information": None, "cpu_seconds": time.process_time() - started}
        mixture = place / "mixture"
        plan = make_mixture(model, mixture, data, arm, seed, branches)
        steps = scale.steps - round(arm.branch_share * scale.steps)
        source = mixture
        if not arm.num_experts:
            source = model
            steps = round(steps * count_ratio(model, mixture, scale)) if arm.equal_compute else steps
        phases = choose_phases(arm, scale, steps)
        setup = Setup(mixture, data, place / "scratch", "float32", seed)
        trained = train_model(Job("fine-tuned", source, place / "output", phases), setup, None, quiet)
        domains = measure_domains(place / "output", data, NEXT_TOKEN) if arm.num_experts else None
        return {
            "before": measure_losses(source, data),
            "losses": measure_losses(place / "output", data),
            "information": statistics.mean(domains.information) if domains else None,
            "num_active_parameters": plan.num_active_parameters if arm.num_experts else None,
            "steps": steps,
            "best_step": trained.best_step,
            "cpu_seconds": time.process_time() - started,
            "validation": [
                (step.num_tokens, step.validation_loss) for step in trained.history if step.validation_loss is not None
            ],
        }


def choose_phases(arm: Arm, scale: Scale, steps: int) -> tuple[FinetuneConfig, ...]:
    """The training of an arm's model; the router alone at first where the arm says so."""
    losses = {"domain_coefficient": arm.domain_coefficient, "balance_coefficient": arm.balance_coefficient}
    settings = scale.finetune.model_copy(
        update={"steps": steps - arm.router_steps, **(losses if arm.num_experts else {})}
    )
    if not arm.router_steps:
        return (settings,)
    return settings.model_copy(update={"train": "router", "steps": arm.router_steps}), settings


def make_mixture(
    model: Path, mixture: Path, data: Path, arm: Arm, seed: int, branches: Mapping[str, Path]
) -> UpcyclePlan:
    """The mixture before its training, of copies or of branches."""
    config = UpcycleConfig(
        num_experts=arm.num_experts or 4,
        num_experts_per_tok=arm.num_experts_per_tok,
        experts=ExpertsConfig(noise=arm.noise),
        router=arm.start,
        merging=MergingConfig.model_validate({"method": arm.merging}),
    )
    mixture.mkdir()
    reading = read_routers(model, config, read_examples(data, "train"), data, seed, quiet)
    routers = reading.routers if reading else None
    return upcycle(model, mixture, config, seed, quiet, routers, sources=branches or None)


def count_ratio(model: Path, mixture: Path, scale: Scale) -> float:
    """Operations of a mixture's step beside those of the dense model's."""
    shapes = [load_shape(each, NEXT_TOKEN) for each in (mixture, model)]
    layers = sparse_layers(shapes[0])
    counts = [training_flops(shape, scale.finetune, layers, scale.block_size) for shape in shapes]
    return counts[0] / counts[1]


def train_branches(model: Path, data: Path, arm: Arm, scale: Scale, seed: int, place: Path) -> dict[str, Path]:
    """The dense model continued on each domain by itself, on equal parts of the branches' tokens."""
    names, _ = read_domains(data, "train")
    steps = round(arm.branch_share * scale.steps / len(names))
    rate = scale.learning_rate * arm.branch_rate
    settings = scale.finetune.model_copy(
        update={"steps": steps, "warmup_steps": steps // 10, "eval_steps": steps, "learning_rate": rate}
    )
    make_mixture(model, place / "shape", data, Arm(), seed, {})
    branches = {}
    for number, name in enumerate(names):
        own, branches[name] = place / f"{name}-data", place / f"{name}-branch"
        own.mkdir()
        for split in ("train", "validation", "test"):
            examples = read_examples(data, split)
            chosen = examples.domains == number
            blocks = {"input_ids": examples.ids[chosen].int(), "domains": examples.domains[chosen].int()}
            save_file(blocks, own / f"{split}.safetensors")
        shutil.copy(data / "data.json", own)
        setup = Setup(place / "shape", own, place / f"{name}-scratch", "float32", seed)
        train_model(Job("dense continued", model, branches[name], (settings,)), setup, None, quiet)
    return branches


@torch.no_grad()
def measure_together(branches: Mapping[str, Path], data: Path, how: str) -> dict[str, float]:
    """Held-out loss of each domain of the branches' mean weights, or of their mean predictions."""
    names, _ = read_domains(data, "test")
    test, models = read_examples(data, "test"), [load_model(each, torch.float32) for each in branches.values()]
    if how == "soup":
        states = [each.state_dict() for each in models]
        models[0].load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
        models = models[:1]
    losses = []
    for block in test.ids:
        probabilities = torch.stack([each(block[None]).logits.softmax(-1) for each in models]).mean(0)
        losses.append(next_token_loss(probabilities.log(), block[None]))
    by_block = torch.stack(losses)
    return {name: float(by_block[test.domains == number].mean()) for number, name in enumerate(names)}


def measure_losses(directory: Path, data: Path) -> dict[str, float]:
    """Held-out loss of each domain, in nats a token."""
    names, _ = read_domains(data, "test")
    test, model = read_examples(data, "test"), load_model(directory, torch.float32)
    losses = torch.tensor(held_out_losses(model, test.ids))
    return {name: float(losses[test.domains == number].mean()) for number, name in enumerate(names)}


def digest(*settings: object) -> str:
    """What a cached result was made with."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


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
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.arms:
            path = cache / f"{name} {seed} {digest(arguments.model, scale, ARMS[name])}.json"
            if not path.is_file():
                fresh = path.with_suffix(".partial")
                fresh.write_text(json.dumps(measure(arguments.model, data, ARMS[name], scale, seed)), encoding="utf-8")
                fresh.rename(path)
            result = json.loads(path.read_text(encoding="utf-8"))
            mean = statistics.mean(result["losses"].values())
            print(f"seed {seed}, {name}: {mean:.4f} ({result['cpu_seconds']:.0f} s)", file=sys.stderr, flush=True)
            results.setdefault(name, []).append(result)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch ", end=""
    )
    print(f"{torch.__version__}, float32; {arguments.model.name}; {scale}\n")
    print_table(results)


if __name__ == "__main__":
    main()
