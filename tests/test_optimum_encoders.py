"""Packages without a cache run in the classes of optimum, and in pipelines of an older transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import ask_client
from PIL import Image
from test_hosts import PLAIN, convert, ignore, save_dense
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessor

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.upcycle.checkpoints.loaded import load_model

pytestmark = pytest.mark.optimum
LABELS = ["O", "person", "place"]
TEXTS = ["Licensed under the Apache License", "You may not use this file", "copyright"]

# What a user writes: a class by name, the inputs that a tokenizer or an image processor gives, a pipeline.
SCRIPT = """
import json, sys
import numpy as np
import optimum.onnxruntime as ort
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

answers = {}
for package, name, task in json.loads(sys.argv[1]):
    model = getattr(ort, name).from_pretrained(package)
    found = answers[package] = {"inputs": sorted(model.input_names)}
    if task == "image-classification":
        processor = AutoImageProcessor.from_pretrained(package, use_fast=False)
        images = [Image.open(path) for path in json.loads(sys.argv[3])]
        given, beside, read = processor(images, return_tensors="pt"), {"image_processor": processor}, images
    else:
        tokenizer = AutoTokenizer.from_pretrained(package)
        read = json.loads(sys.argv[2])
        given, beside = tokenizer(read, padding=True, return_tensors="pt"), {"tokenizer": tokenizer}
    outputs = model(**given)
    found["outputs"] = {key: value.tolist() for key, value in outputs.items()}
    if task is not None:
        told = pipeline(task, model=model, **beside)(read)
        found["told"] = json.loads(json.dumps(told, default=float))
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Case:
    """A tiny model of transformers' own classes, optimum's class for it, and the pipeline that tells its labels."""

    row: str
    architecture: str
    client: str
    reads: tuple[str, ...]
    pipeline: str | None = None


CASES = (
    Case("bert", "BertModel", "ORTModelForFeatureExtraction", ("attention_mask", "input_ids", "token_type_ids")),
    Case(
        "bert",
        "BertForTokenClassification",
        "ORTModelForTokenClassification",
        ("attention_mask", "input_ids", "token_type_ids"),
        "token-classification",
    ),
    Case(
        "roberta",
        "RobertaForSequenceClassification",
        "ORTModelForSequenceClassification",
        ("attention_mask", "input_ids"),
        "text-classification",
    ),
    Case("distilbert", "DistilBertForMaskedLM", "ORTModelForMaskedLM", ("attention_mask", "input_ids")),
    Case(
        "electra",
        "ElectraForQuestionAnswering",
        "ORTModelForQuestionAnswering",
        ("attention_mask", "input_ids", "token_type_ids"),
    ),
    Case(
        "vit", "ViTForImageClassification", "ORTModelForImageClassification", ("pixel_values",), "image-classification"
    ),
)
IDS = [case.architecture for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@dataclass(frozen=True)
class Clients:
    """What optimum gave for each package, and where packages, twins and images lie."""

    folder: Path
    answers: dict[str, Any]
    images: list[Path]

    def answer(self, case: Case) -> dict[str, Any]:
        found: dict[str, Any] = self.answers[str(self.folder / case.architecture / "package")]
        return found

    def compute(self, case: Case) -> dict[str, torch.Tensor]:
        """The twin's outputs in torch, on what its own tokenizer or image processor gives."""
        twin = self.folder / case.architecture / "twin"
        if case.row == "vit":
            images = [Image.open(path) for path in self.images]
            given = ViTImageProcessor.from_pretrained(twin)(images, return_tensors="pt")
        else:
            given = AutoTokenizer.from_pretrained(twin)(TEXTS, padding=True, return_tensors="pt")
            given = {name: value for name, value in given.items() if name in case.reads}
        task = json.loads((twin.parent / "task.json").read_text())
        with torch.no_grad():
            return dict(load_model(twin, torch.float32, task)(**given).items())


def export(folder: Path, case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    """A dense model with what its client reads beside it, its mixture, twin and package."""
    (folder / "dense").parent.mkdir()
    named = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
    values: dict[str, Any] = {} if case.pipeline is None else named
    values |= {"type_vocab_size": 1} if case.row == "roberta" else {}  # as published ones have
    if case.row == "vit":
        source = save_dense(folder / "dense", case.row, case.architecture, **values)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(source)
    else:
        source = save_dense(folder / "dense", case.row, case.architecture, vocab_size=301, **values)
        tokenizer.save_pretrained(source)
    plan = convert(source, folder / "moe", {**PLAIN, "experts": {"noise": 0.3}})
    (folder / "task.json").write_text(json.dumps(plan.conversion.family.task))
    for name in ("twin", "package"):
        (folder / name).mkdir()
    quantize_checkpoint(folder / "moe", folder / "twin", "float32", QuantizeConfig(), ignore)
    write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped"), ignore)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Clients:
    """All packages in one process of the other environment, since importing takes longer than they do."""
    folder = tmp_path_factory.mktemp("clients")
    tokenizer = AutoTokenizer.from_pretrained(_save(tiny_tokenizer, folder / "tokenizer"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for case in CASES:
        export(folder / case.architecture, case, tokenizer)
    drawn, images = np.random.default_rng(0), [folder / f"{n}.png" for n in range(3)]
    for path in images:
        Image.fromarray(drawn.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    wishes = [(str(folder / case.architecture / "package"), case.client, case.pipeline) for case in CASES]
    answers = ask_client(SCRIPT, json.dumps(wishes), json.dumps(TEXTS), json.dumps([str(path) for path in images]))
    return Clients(folder, answers, images)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@every_case
def test_optimum_gives_the_outputs_of_transformers(clients: Clients, case: Case) -> None:
    """Within 1e-4 of the largest number, padded rows too. Of hidden states optimum leaves the pooler out."""
    found = {name: torch.tensor(value) for name, value in clients.answer(case)["outputs"].items()}
    expected = clients.compute(case)
    assert found.keys() == expected.keys() - {"pooler_output"}
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@every_case
def test_a_package_reads_what_its_model_does(clients: Clients, case: Case) -> None:
    """Token types where the model has more than one."""
    assert tuple(clients.answer(case)["inputs"]) == case.reads


def test_the_token_pipeline_tells_the_labels(clients: Clients) -> None:
    """Of every token that is not `O`, as the twin's largest logit says."""
    case = CASES[1]
    logits, told = clients.compute(case)["logits"], clients.answer(case)["told"]
    tokenizer = AutoTokenizer.from_pretrained(clients.folder / case.architecture / "twin")
    assert len(told) == len(TEXTS)
    for text, row, entities in zip(TEXTS, logits, told, strict=True):
        labels = [LABELS[n] for n in row[: len(tokenizer(text)["input_ids"])].argmax(-1)]
        expected = {place: label for place, label in enumerate(labels) if place and label != "O"}  # <s> is at 0
        assert {entity["index"]: entity["entity"] for entity in entities} == expected
    assert any(told)


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=[IDS[2], IDS[5]])
def test_pipelines_tell_the_labels_of_a_text_or_an_image(clients: Clients, case: Case) -> None:
    """And their probabilities."""
    chances, told = clients.compute(case)["logits"].softmax(-1), clients.answer(case)["told"]
    for row, found in zip(chances, told, strict=True):
        best = found[0] if isinstance(found, list) else found
        assert best["label"] == LABELS[int(row.argmax())]
        assert best["score"] == pytest.approx(float(row.max()), abs=1e-4)


def test_configs_name_the_dense_family(clients: Clients) -> None:
    for case in CASES:
        config = json.loads((clients.folder / case.architecture / "package" / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == (case.row, [case.architecture])
