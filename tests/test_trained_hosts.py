"""Small trained models of families without a sparse twin: what they say is the same behind every stage.

`recipes/models/make_hosts.py` trains them, minutes each, when a test first asks for one; pytest's cache keeps them.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import dense2moe
from test_hosts import PLAIN, convert, ignore
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.single_pass import check_single_pass
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.sampling import Sampling
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.upcycle.tasks.masked_token import read_masking

MAKER = Path(__file__).parent.parent / "recipes" / "models" / "make_hosts.py"
RECIPE = """
source: {source}
data:
  source: {{kind: python-docs}}
  block_size: {block_size}
  max_train_tokens: 32768
  max_validation_tokens: 2048
  max_test_tokens: 4096
upcycle: {{target: mixture, num_experts: 4, num_experts_per_tok: 2}}
finetune: null
variants: [float32, int8]
"""
PROMPTS = ("The for statement is used to", "class Queue", "def read_lines(path):", "Return a string")
NUM_NEW = 24

pytestmark = pytest.mark.recipes

Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest) -> Trained:
    """Models by name, trained when first asked for."""
    if "recipes" not in request.config.option.markexpr:
        pytest.skip("takes minutes: pytest -m recipes")
    cache = request.config.cache.mkdir("hosts")

    def find(name: str) -> Path:
        if not (cache / name).is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                subprocess.run([sys.executable, str(MAKER), str(Path(folder, name))], check=True)
                Path(folder, name).rename(cache / name)
        return cache / name

    return find


def make(name: str, *arguments: Any) -> Any:
    """What a function of the script gives."""
    return runpy.run_path(str(MAKER))[name](*arguments)


def load(auto: Any, directory: Path) -> PreTrainedModel:
    """By an auto class, in evaluation mode."""
    loaded: PreTrainedModel = auto.from_pretrained(directory, dtype=torch.float32).eval()
    return loaded


def run_recipe(source: Path, folder: Path, block_size: int) -> dict[str, Path]:
    """A run with training switched off, which parity passes in both variants: its artifacts by stage."""
    (folder / "host.yaml").write_text(RECIPE.format(source=source, block_size=block_size))
    finished = dense2moe("run", folder / "host.yaml", "--workdir", folder / "run")
    assert finished.exit_code == 0, finished.stderr
    stages = {path.name.rpartition("-")[0]: path for path in (folder / "run").iterdir() if path.is_dir()}
    facts = json.loads((stages["report"] / "report.json").read_text())
    assert {name: variant["parity"]["passed"] for name, variant in facts["variants"].items()} == {
        "float32": True,
        "int8": True,
    }
    return stages


@torch.no_grad()
def test_gpt2_writes_the_same_text(trained: Trained, tmp_path: Path) -> None:
    """The dense model, the mixture, and the package without torch; and it has learned something to say."""
    source = trained("gpt2-1m")
    stages, tokenizer = run_recipe(source, tmp_path, 128), AutoTokenizer.from_pretrained(source)
    dense, mixture = (load(AutoModelForCausalLM, directory) for directory in (source, stages["upcycle"]))
    decoder = Decoder(stages["onnx-float32"])
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = {
            tuple(model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)[0, ids.shape[1] :].tolist())
            for model in (dense, mixture)
        }
        steps = decoder.generate(ids.tolist(), NUM_NEW, Sampling(), [tokenizer.eos_token_id])
        assert said == {tuple(token for (token,) in steps)}, prompt
    blocks = make("read_blocks", tokenizer, "test")[:64]
    losses = [float(model(blocks, labels=blocks).loss) for model in (dense, mixture)]
    assert losses[0] < 5.0  # that of guessing is 7.6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
def test_bert_fills_the_same_masks(trained: Trained, tmp_path: Path) -> None:
    source = trained("bert-1m")
    stages, tokenizer = run_recipe(source, tmp_path, 32), AutoTokenizer.from_pretrained(source)
    dense, mixture = (load(AutoModelForMaskedLM, directory) for directory in (source, stages["upcycle"]))
    given = make("mask", make("read_blocks", tokenizer, "test").view(-1, 32)[:256], read_masking(tokenizer, "bert"))
    chosen, ids = given["labels"] >= 0, given["input_ids"]
    package = SinglePass(stages["onnx-float32"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    filled = [
        dense(ids).logits,
        mixture(ids).logits,
        package.run({name: inputs[name] for name in package.inputs})["logits"],
    ]
    words = [logits[chosen].argmax(-1) for logits in filled]
    labels = given["labels"][chosen]
    commonest = float(labels.bincount().max()) / len(labels)
    assert float((words[0] == labels).float().mean()) > 1.5 * commonest  # it reads what stands around a mask
    assert torch.equal(words[1], words[0])
    assert torch.equal(words[2], words[0])


@torch.no_grad()
def test_vit_reads_the_same_digits(trained: Trained, tmp_path: Path) -> None:
    """Of 400 images that it has not learned from; images have no task yet that a recipe trains."""
    source, moe = trained("vit-1m"), tmp_path / "moe"
    convert(source, moe, PLAIN)
    dense, mixture = (load(AutoModelForImageClassification, directory) for directory in (source, moe))
    _, digits = make("read_digits")
    read = dense(digits["pixel_values"]).logits.argmax(-1)
    assert float((read == digits["labels"]).float().mean()) >= 0.95
    assert torch.equal(mixture(digits["pixel_values"]).logits.argmax(-1), read)
    for variant in ("float32", "int8"):
        twin, package = tmp_path / f"twin-{variant}", tmp_path / variant
        for directory in (twin, package):
            directory.mkdir()
        quantize_checkpoint(moe, twin, variant, QuantizeConfig(block_size=16), ignore)
        write_package(twin, package, OnnxConfig(lowering="grouped"), ignore)
        parity = check_single_pass(package, twin)
        assert parity.passed, parity.breaches
        found = SinglePass(package).run({"pixel_values": digits["pixel_values"]})["logits"].argmax(-1)
        assert int((found != read).sum()) <= (0 if variant == "float32" else 4)
