"""Arms of the domains benchmark: ways to spend the same tokens, each made, trained and measured."""

from __future__ import annotations

import csv
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

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
from dense2moe.upcycle.training.controls import stretch
from dense2moe.upcycle.training.domain_routing import measure_domains
from dense2moe.upcycle.training.evaluation import judge_model
from dense2moe.upcycle.training.flops import training_flops
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model

_SEPARATOR = "\n\x1e\n"  # no document has it
_TRAIN_CHARS, _TEST_CHARS = 1_300_000, 120_000  # of each domain: about the tokens that are trained on, read once


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens; the defaults are copies with a random router.

    router: how the router starts. num_experts: experts a layer; 0 is the dense model. granularity: experts that a copy
    is cut into. layers: those that get experts. equal_compute: the dense model gets the steps that take a mixture's
    operations. length: share of the benchmark's steps. rate: factor of its learning rates. branch_share: of all tokens,
    those of the branches; merging: what becomes of all that is no expert. joint_share: of all tokens, those at first on
    which experts alone learn, together, each from its own domain's text. router_steps: steps of the router alone, after
    that. together: branches are not merged into a mixture, their weights are averaged (soup), or their predictions
    (ensemble).
    """

    router: str = "normal"
    domain_coefficient: float = 0.0
    balance_coefficient: float = 0.0
    num_experts: int = 4
    num_experts_per_tok: int = 2
    granularity: int = 1
    layers: str = "all"
    noise: float = 0.0
    equal_compute: bool = False
    length: float = 1.0
    rate: float = 1.0
    branch_share: float = 0.0
    branch_rate: float = 1.0
    merging: str = "mean"
    joint_share: float = 0.0
    router_steps: int = 0
    together: str = ""

    @property
    def start(self) -> RouterConfig:
        """How the router starts; logits of rows from data are spread more, as they mean something."""
        return RouterConfig.model_validate({"kind": self.router, "logit_std": 1.0 if self.router == "normal" else 2.0})

    def __str__(self) -> str:
        """What differs from plain copies: a result is kept under it, and outlives fields that come later."""
        own = ((field, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{field.name}={value!r}" for field, value in own if value != field.default)


_BALANCED = {"balance_coefficient": 0.01}
TOLD: dict[str, Any] = {"router": "ridge", "domain_coefficient": 0.1}
ARMS = {
    "dense continued": Arm(num_experts=0),
    "dense continued, equal compute": Arm(num_experts=0, equal_compute=True),
    "copies, random router, balance": Arm(**_BALANCED),
    "copies, ridge router, domain loss": Arm(**TOLD),
    "copies, random router, domain loss": Arm(domain_coefficient=0.1),
    "copies, ridge router": Arm("ridge"),
    "copies, prototypes, domain loss": Arm("prototypes", 0.1),
    "copies + noise 0.1, random router, balance": Arm(**_BALANCED, noise=0.1),
    "copies + noise 0.1, ridge router, domain loss": Arm(**TOLD, noise=0.1),
    "copies, ridge router, domain loss, 8 experts": Arm(**TOLD, num_experts=8),
    "copies, ridge router, domain loss, top-1": Arm(**TOLD, num_experts_per_tok=1),
    "jointly trained by domain for a tenth, ridge router, domain loss": Arm(**TOLD, joint_share=0.1),
    "jointly trained by domain for a quarter, ridge router, domain loss": Arm(**TOLD, joint_share=0.25),
    "branches of a tenth, ridge router, domain loss": Arm(**TOLD, branch_share=0.1),
    "branches of a quarter, ridge router, domain loss": Arm(**TOLD, branch_share=0.25),
    "branches of a quarter, random router, balance": Arm(**_BALANCED, branch_share=0.25),
    "branches of a quarter, prototypes, domain loss": Arm("prototypes", 0.1, branch_share=0.25),
    "branches of a quarter, ridge router": Arm("ridge", branch_share=0.25),
    "branches of a quarter, trunk of the base": Arm(**TOLD, branch_share=0.25, merging="base"),
    "branches of a quarter, 8 experts": Arm(**TOLD, num_experts=8, branch_share=0.25),
    "branches of a quarter, router alone at first": Arm(**TOLD, branch_share=0.25, router_steps=40),
    "branches of a quarter at a third of the rate": Arm(**TOLD, branch_share=0.25, branch_rate=1 / 3),
    "branches of a tenth at a third of the rate": Arm(**TOLD, branch_share=0.1, branch_rate=1 / 3),
    "branches of a quarter, averaged": Arm(branch_share=0.25, together="soup"),
    "branches of a quarter, ensembled": Arm(branch_share=0.25, together="ensemble"),
    "branches of all tokens, averaged": Arm(branch_share=1.0, together="soup"),
    "branches of all tokens, ensembled": Arm(branch_share=1.0, together="ensemble"),
}


@dataclass(frozen=True)
class Scale:
    """How long and how fast every arm trains; a step is `batch_size` blocks of `block_size` tokens."""

    steps: int
    batch_size: int
    block_size: int
    learning_rate: float

    def settings(self, steps: int, rate: float, **own: Any) -> FinetuneConfig:
        """The settings that arms share, for so many steps at a factor of the learning rate."""
        return FinetuneConfig.model_validate(
            {
                "steps": steps,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate * rate,
                "router_learning_rate": self.learning_rate * rate,
                "warmup_steps": min(20, steps // 4),
                "eval_steps": max(1, steps // 8),
                "patience": 99,
                "precision": "float32",
                **own,
            }
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
        spent = count_training(model, branch_phases(arm, scale), scale)
        if arm.together:
            losses = measure_together(branches, data, arm.together)
            return {"losses": losses, "information": None, "cpu_seconds": time.process_time() - started, **spent}
        mixture = place / "mixture"
        plan = make_mixture(model, mixture, data, arm, seed, branches)
        source = mixture if arm.num_experts else model
        phases = choose_phases(arm, scale)
        if arm.equal_compute:
            make_mixture(model, place / "shape", data, Arm(), seed, {})
            ratio = (
                count_training(place / "shape", phases, scale)["flops"] / count_training(model, phases, scale)["flops"]
            )
            phases = stretch(phases, ratio)
        layers = sparse_layers(load_shape(mixture, NEXT_TOKEN))
        setup = Setup(layers, data, place / "scratch", "float32", seed)
        trained = train_model(Job("fine-tuned", source, place / "output", phases), setup, None, quiet)
        domains = measure_domains(place / "output", data, NEXT_TOKEN) if arm.num_experts else None
        own = count_training(source, phases, scale)
        return {
            "before": measure_losses(source, data),
            "losses": measure_losses(place / "output", data),
            "information": statistics.mean(domains.information) if domains else None,
            "num_active_parameters": plan.num_active_parameters if arm.num_experts else None,
            "best_step": trained.best_step,
            "cpu_seconds": time.process_time() - started,
            "validation": [
                (step.num_tokens, step.validation_loss) for step in trained.history if step.validation_loss is not None
            ],
            **{name: spent[name] + own[name] for name in own},
        }


def choose_phases(arm: Arm, scale: Scale) -> tuple[FinetuneConfig, ...]:
    """The training of an arm's model: experts by domain and the router alone at first where the arm says so."""
    steps = round(scale.steps * arm.length)
    joint = round(arm.joint_share * steps)
    losses = {"domain_coefficient": arm.domain_coefficient, "balance_coefficient": arm.balance_coefficient}
    settings = scale.settings(
        steps - round(arm.branch_share * steps) - joint - arm.router_steps,
        arm.rate,
        **(losses if arm.num_experts else {}),
    )
    by_domain = scale.settings(joint, arm.rate, train="experts", routing="by-domain") if joint else None
    alone = settings.model_copy(update={"train": "router", "steps": arm.router_steps}) if arm.router_steps else None
    return tuple(phase for phase in (by_domain, alone, settings) if phase is not None)


def branch_phases(arm: Arm, scale: Scale, num_domains: int = 4) -> tuple[FinetuneConfig, ...]:
    """The training of each branch, on equal parts of the branches' tokens."""
    steps = round(arm.branch_share * arm.length * scale.steps / num_domains)
    if not steps:
        return ()
    settings = scale.settings(steps, arm.rate * arm.branch_rate, warmup_steps=steps // 10, eval_steps=steps)
    return (settings,) * num_domains


def count_training(model: Path, phases: tuple[FinetuneConfig, ...], scale: Scale) -> dict[str, float]:
    """Tokens and floating-point operations of a checkpoint's training."""
    shape = load_shape(model, NEXT_TOKEN)
    layers = sparse_layers(shape) or tuple(range(shape.config.num_hidden_layers))
    tokens = [phase.steps * phase.batch_size * scale.block_size for phase in phases]
    costs = [training_flops(shape, phase, layers, scale.block_size) for phase in phases]
    return {"tokens": sum(tokens), "flops": sum(count * cost for count, cost in zip(tokens, costs, strict=True))}


def make_mixture(
    model: Path, mixture: Path, data: Path, arm: Arm, seed: int, branches: Mapping[str, Path]
) -> UpcyclePlan:
    """The mixture before its training, of copies or of branches."""
    granular = {"kind": "granular", "granularity": arm.granularity} if arm.granularity > 1 else {}
    config = UpcycleConfig(
        num_experts=arm.num_experts or 4,
        num_experts_per_tok=arm.num_experts_per_tok,
        layers=arm.layers,
        experts=ExpertsConfig.model_validate({"noise": arm.noise, **granular}),
        router=arm.start,
        merging=MergingConfig.model_validate({"method": arm.merging}),
    )
    mixture.mkdir()
    reading = read_routers(model, config, read_examples(data, "train"), data, seed, quiet, sources=branches or None)
    routers = reading.routers if reading else None
    return upcycle(model, mixture, config, seed, quiet, routers, sources=branches or None)


def train_branches(model: Path, data: Path, arm: Arm, scale: Scale, seed: int, place: Path) -> dict[str, Path]:
    """The dense model continued on each domain by itself."""
    names, _ = read_domains(data, "train")
    layers = tuple(range(load_shape(model, NEXT_TOKEN).config.num_hidden_layers))
    branches = {}
    for name, settings in zip(names, branch_phases(arm, scale, len(names)), strict=True):
        branches[name] = place / f"{name}-branch"
        setup = Setup(layers, data, place / f"{name}-scratch", "float32", seed, domain=name)
        train_model(Job("branch", model, branches[name], (settings,)), setup, None, quiet)
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
    losses = torch.tensor(judge_model(model, test).losses)
    return {name: float(losses[test.domains == number].mean()) for number, name in enumerate(names)}
