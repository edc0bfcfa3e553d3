"""Packages without a cache run in transformers.js under node, loaded as its users load a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hosts import PLAIN, convert, ignore, save_dense
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.loaded import load_model

FOLDER = "DENSE2MOE_TRANSFORMERS_JS"
RECIPE = "mkdir js && npm install --prefix js --ignore-scripts @huggingface/transformers@4.3.2"
TEXTS = ["Licensed under the Apache License", "You may not use this file", "copyright"]
IMAGE = [3, 16, 16]

# Nothing is told of the package but where it lies: file names and the file of weights are in its config.json.
SCRIPT = """
import { AutoModel, AutoTokenizer, Tensor, env } from "@huggingface/transformers";
import * as transformers from "@huggingface/transformers";

const [folder, name, model_class, given] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = folder;
const model = await transformers[model_class].from_pretrained(name);
const { texts, pixels, shape } = JSON.parse(given);
const inputs = texts
  ? (await AutoTokenizer.from_pretrained(name))(texts, { padding: true })
  : { pixel_values: new Tensor("float32", Float32Array.from(pixels), shape) };
const outputs = await model(inputs);
const told = Object.fromEntries(Object.entries(outputs).map(([key, value]) => [key, value.tolist()]));
console.log(JSON.stringify({ told, ids: inputs.input_ids?.tolist().map((row) => row.map(Number)) }));
"""

WRITES = """
import { AutoModelForSeq2SeqLM, Tensor, env } from "@huggingface/transformers";

const [folder, name, given] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = folder;
const model = await AutoModelForSeq2SeqLM.from_pretrained(name);
const { ids, mask, options } = JSON.parse(given);
const pack = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const written = await model.generate({ input_ids: pack(ids), attention_mask: pack(mask), ...options });
console.log(JSON.stringify({ ids: written.tolist().map((row) => row.map(Number)) }));
"""

pytestmark = pytest.mark.transformers_js


def ask_node(*arguments: Any, script: str = SCRIPT) -> dict[str, Any]:
    """What a script prints; skips the test without node or the package."""
    folder, node = os.environ.get(FOLDER), shutil.which("node")
    if folder is None or node is None:
        lack = "node is not on the PATH" if node is None else f"{FOLDER} is not set"
        pytest.skip(f"{lack}; install node, `{RECIPE}`, and set {FOLDER} to that folder")
    if not (Path(folder) / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"{folder} has no @huggingface/transformers; make it by `{RECIPE}`")
    command = [node, "--input-type=module", "-e", script, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("row", "architecture", "client", "variant"),
    [
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM", "float32"),
        ("bert", "BertForTokenClassification", "AutoModelForTokenClassification", "int8"),
        ("bert", "BertModel", "AutoModel", "int4"),
        ("vit", "ViTForImageClassification", "AutoModelForImageClassification", "float32"),
    ],
)
def test_transformers_js_gives_the_outputs_of_torch(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, row: str, architecture: str, client: str, variant: Variant
) -> None:
    """Of the twin, within 1e-4 of the largest number: three rows, texts of other lengths padded."""
    is_text = row != "vit"
    source = save_dense(tmp_path / "dense", row, architecture, **({"vocab_size": 301} if is_text else {}))
    if is_text:
        tiny_tokenizer.save_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(source)
    plan = convert(source, tmp_path / "moe", {**PLAIN, "experts": {"noise": 0.3}})
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(tmp_path / "moe", twin, variant, QuantizeConfig(block_size=16), ignore)
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=32), ignore)
    if is_text:
        inputs = dict(AutoTokenizer.from_pretrained(twin)(TEXTS, padding=True, return_tensors="pt"))
        given: dict[str, Any] = {"texts": TEXTS}
    else:
        pixels = np.random.default_rng(0).standard_normal((3, *IMAGE), np.float32)
        inputs = {"pixel_values": torch.from_numpy(pixels)}
        given = {"pixels": pixels.ravel().tolist(), "shape": list(pixels.shape)}
    answer = ask_node(tmp_path, package.name, client, json.dumps(given))
    with torch.no_grad():
        expected = load_model(twin, torch.float32, plan.conversion.family.task)(**inputs)
    assert answer.get("ids") == (inputs["input_ids"].tolist() if is_text else None)
    assert answer["told"]
    for name, value in answer["told"].items():
        assert (torch.tensor(value) - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_transformers_js_writes_what_transformers_writes(tmp_path: Path) -> None:
    """BART in 8 bits: the encoder's output and the merged decoder's cache, padded texts too."""
    source = save_dense(tmp_path / "dense", "bart", init_std=0.3)
    plan = convert(source, tmp_path / "moe", {**PLAIN, "experts": {"noise": 0.3}})
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(tmp_path / "moe", twin, "int8", QuantizeConfig(block_size=16), ignore)
    write_package(twin, package, OnnxConfig(lowering="grouped", activation_bits=32), ignore)
    ids, mask = torch.arange(5, 23).reshape(2, 9), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 1}
    given = {"ids": ids.tolist(), "mask": mask.tolist(), "options": options}
    answer = ask_node(tmp_path, package.name, json.dumps(given), script=WRITES)
    model = load_model(twin, torch.float32, plan.conversion.family.task)
    assert answer["ids"] == model.generate(input_ids=ids, attention_mask=mask, **options).tolist()
