"""Make the embedded LoRA adapters: four kinds of text that python-docs-1m had never seen.

    python recipes/models/make_adapters.py

Trains one adapter a domain of the data of `recipes/merge-adapters.yaml`, by peft in a plain loop, on the CPU, and
writes them as peft does, in bfloat16, with a page that states the recipe, the time and the held-out losses.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dense2moe.api import prepare_data
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.upcycle.data.config import name_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.examples import Examples

HERE = Path(__file__).parent
BASE = HERE / "python-docs-1m"
OUTPUT = HERE / "python-docs-1m-adapters"
RECIPE = HERE.parent / "merge-adapters.yaml"
STEPS, BATCH, PEAK_LR, WARMUP = 150, 8, 4e-3, 10
SETTINGS = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def load_base() -> torch.nn.Module:
    """The dense model, in float32."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)  # type: ignore[no-any-return]


def learning_rate(step: int) -> float:
    """Share of the peak rate: linear warm-up, cosine to nothing."""
    done = (step - WARMUP) / (STEPS - WARMUP)
    return min((step + 1) / WARMUP, (1 + math.cos(math.pi * max(0.0, done))) / 2)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    model.eval()
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in blocks.split(BATCH)]
    model.train()
    return sum(losses) / len(blocks)


def train(domain: str, text: Examples) -> None:
    """One adapter, trained on the blocks of one domain and written."""
    torch.manual_seed(0)
    model: PeftModel = get_peft_model(load_base(), SETTINGS)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    order = torch.cat([torch.randperm(len(text)) for _ in range(STEPS * BATCH // len(text) + 1)])
    model.train()
    for chosen in order[: STEPS * BATCH].split(BATCH):
        loss = model(input_ids=text.ids[chosen], labels=text.ids[chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for parameter in learning:
        parameter.data = parameter.data.to(torch.bfloat16)
    directory = OUTPUT / domain
    model.save_pretrained(directory)
    (directory / "README.md").unlink()  # peft's own, which asks for what the page beside says
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": BASE.name, "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_page(losses: dict[str, dict[str, tuple[float, float]]], facts: dict[str, str]) -> None:
    """The page of all adapters: recipe, time, losses."""
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    measured = "\n".join(
        f"| {name} | " + " | ".join(f"{before:.4f} → {after:.4f}" for before, after in of.values()) + " |"
        for name, of in losses.items()
    )
    page = f"""---
license: apache-2.0
library_name: peft
base_model: python-docs-1m
---
# python-docs-1m-adapters

LoRA adapters of [python-docs-1m](../python-docs-1m), one for each of four kinds of text that it had never seen, which
`recipes/merge-adapters.yaml` makes one mixture of experts of. They are what peft writes. They learned from files of
installed packages ({", ".join(losses)}), which are under BSD and Apache licences and not part of this repository.

| fact | value |
|---|---|
{rows}

| adapter | validation loss, nats | test loss, nats |
|---|---|---|
{measured}

Made by `python recipes/models/make_adapters.py`.
"""
    (OUTPUT / "README.md").write_text(page, encoding="utf-8")


def main() -> None:
    """Train, measure, write."""
    data = load_recipe(RECIPE).recipe.data
    shutil.rmtree(OUTPUT, ignore_errors=True)
    losses: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        blocks = Path(scratch) / "data"
        found = prepare_data(BASE, blocks, data)
        texts = {split: read_examples(blocks, split) for split in ("train", "validation", "test")}
    for number, domain in enumerate(name_domains(data.source)):
        train(domain, texts["train"].of_domain(number))
        losses[domain] = {}
        for split in ("validation", "test"):
            held_out = texts[split].of_domain(number).ids
            adapted = PeftModel.from_pretrained(load_base(), OUTPUT / domain)
            losses[domain][split] = (held_out_loss(load_base(), held_out), held_out_loss(adapted, held_out))
        print(domain, losses[domain], flush=True)
    facts = {
        "adapters": f"LoRA, rank {SETTINGS.r}, alpha {SETTINGS.lora_alpha}, on all linear layers, in bfloat16",
        "training": f"{STEPS} steps of {BATCH} x {data.block_size} tokens each, AdamW, peak learning rate {PEAK_LR:g}, "
        f"warm-up {WARMUP} steps, cosine, seed 0",
        "text": f"{found['packages']}, SHA-256 {found['digest']}",
        "with": f"peft {version('peft')}, transformers {version('transformers')}, torch {version('torch')}",
        "time": f"{time.process_time() / 60:.1f} minutes of CPU time, {datetime.now(UTC):%Y-%m-%d}",
    }
    write_page(losses, facts)


if __name__ == "__main__":
    main()
