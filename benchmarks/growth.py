"""A router row for a new domain: who visits the new expert, and what it buys, for each way of making the row.

    python benchmarks/growth.py --output growth.json

One of the four domains of `recipes/merge-adapters.yaml` is kept away from a mixture of the three other adapters, and
its adapter then joins by `add-expert`; so four times, once for each domain. Nothing is trained. A row by ridge
regression reads training text of all four domains, one by projection that of the new domain alone. Visits are shares of
tokens of text kept back, mean of all layers; losses are of the held-out test split, in nats a token, the mean over
domains.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense2moe import api
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.upcycle.building.growth import RouterRow
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.training.evaluation import losses_by_domain

ROOT = Path(__file__).parent.parent
BASE = ROOT / "recipes" / "models" / "python-docs-1m"
ADAPTERS = ROOT / "recipes" / "models" / "python-docs-1m-adapters"
RECIPE = ROOT / "recipes" / "merge-adapters.yaml"
BLOCKS = 32  # of each domain that a row is read from: 8,192 tokens


@dataclass(frozen=True)
class Joined:
    """One new domain and one way of making its row; losses before and after, of the new domain and the others."""

    domain: str
    router: str
    own: float
    others: float
    new_before: float
    new_after: float
    known_before: float
    known_after: float


def read_domains(data: Path, names: Sequence[str]) -> dict[str, api.RouterDomain]:
    """Training text of each domain, as prompts."""
    tokenizer, training = AutoTokenizer.from_pretrained(BASE), read_examples(data, "train")
    found = {}
    for number, name in enumerate(names):
        ids = training.of_domain(number).ids
        texts = tokenizer.batch_decode(ids[choose_evenly(len(ids), BLOCKS)])
        found[name] = api.RouterDomain(prompts=tuple(texts))
    return found


def measure(directory: Path, test: Examples, names: Sequence[str]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return losses_by_domain(model.eval(), test, names)


def join(new: str, domains: dict[str, api.RouterDomain], test: Examples, folder: Path) -> list[Joined]:
    known = [name for name in domains if name != new]
    router = api.RouterConfig(kind="nexus", logit_std=2.0, domains=tuple(domains[name] for name in known))
    sources = {name: ADAPTERS / name for name in known}
    api.upcycle(BASE, folder / "three", api.UpcycleConfig(router=router), sources=sources)
    before = measure(folder / "three", test, list(domains))
    rows = []
    for kind in get_args(RouterRow):
        grown = api.add_expert(
            folder / "three",
            ADAPTERS / new,
            folder / kind,
            base=BASE,
            router=kind,
            domain=domains[new],
            others=[domains[name] for name in known],
        )
        after = measure(folder / kind, test, list(domains))
        means = [sum(losses[name] for name in known) / len(known) for losses in (before, after)]
        own = sum(layer.own for layer in grown.visits) / len(grown.visits)
        others = sum(layer.others or 0.0 for layer in grown.visits) / len(grown.visits)
        rows.append(Joined(new, kind, own, others, before[new], after[new], *means))
        print(rows[-1], flush=True)
    return rows


def show(rows: Sequence[Joined]) -> None:
    print("| router row | its tokens visit | others visit | loss, new domain | loss, other domains |")
    print("|---|--:|--:|--:|--:|")
    for kind in dict.fromkeys(row.router for row in rows):
        own = [row for row in rows if row.router == kind]

        def mean(name: str, of: Sequence[Joined] = own) -> float:
            return sum(getattr(row, name) for row in of) / len(of)

        new, known = (f"{mean(f'{name}_before'):.3f} → {mean(f'{name}_after'):.3f}" for name in ("new", "known"))
        print(f"| {kind} | {mean('own'):.0%} | {mean('others'):.0%} | {new} | {known} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the rows go, as JSON")
    arguments = parser.parse_args()
    config = load_recipe(RECIPE).recipe.data
    rows: list[Joined] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        names = api.prepare_data(BASE, data, config)["domains"]
        test = read_examples(data, "test")
        domains = read_domains(data, names)
        for new in names:
            folder = Path(scratch) / new
            folder.mkdir()
            rows += join(new, domains, test, folder)
    show(rows)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
