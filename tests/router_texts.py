"""Texts of domains that share no letter, and what a dense model's FFNs read of them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense2moe.upcycle.building.config import RouterDomain

ALPHABETS = ("aeiou ", "0123456789", "+-*/=()", "XYZQWK_")


def write(alphabet: str, length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def domains(length: int = 300, seed: int = 0) -> tuple[RouterDomain, ...]:
    """Four domains that share no letter.

    Each has two texts, of lengths that differ from each other and over the domains.
    """
    return tuple(
        RouterDomain(prompts=(write(letters, length // (number + 1), seed), write(letters, length // 4, seed + 1)))
        for number, letters in enumerate(ALPHABETS)
    )


@torch.no_grad()
def ffn_inputs(source: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What the FFN of each layer reads at every token of rows that are run one by one, so without padding.

    By the whole model.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, into in zip(model.model.layers, found, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0][0]))
    for row in rows:
        model(input_ids=torch.tensor([row]), use_cache=False)
    return [torch.cat(states) for states in found]


def cut(texts: Sequence[str], source: Path, max_tokens: int = 10**9, row: int = 512) -> list[list[int]]:
    """Token ids of texts, at most so many in all, in rows of at most 512."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    left, rows = max_tokens, []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), row):
            if piece := ids[start : start + row][:left]:
                rows.append(piece)
                left -= len(piece)
    return rows


def make_blend(trunk: Sequence[Path], experts: Sequence[Path], target: Path) -> Path:
    """A whole model with the mean of some checkpoints' weights, and the mean of others' FFNs."""
    states, ffns = ([load_file(each / "model.safetensors") for each in found] for found in (trunk, experts))
    merged = {
        name: torch.stack([state[name] for state in (ffns if ".mlp." in name else states)]).mean(0)
        for name in states[0]
    }
    shutil.copytree(trunk[0], target)
    save_file(merged, target / "model.safetensors", {"format": "pt"})
    return target
