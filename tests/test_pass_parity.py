"""Parity of packages without a cache by the Python API: any output is judged, and planted faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shapes import each_shape
from test_hosts import PLAIN, convert, save_dense
from transformers import PreTrainedTokenizerFast

from dense2moe.api import (
    MendableError,
    OnnxConfig,
    ParityConfig,
    PassParity,
    QuantizeConfig,
    check_parity,
    export_onnx,
    quantize,
)
from dense2moe.export.variant import Variant
from tests.faults.encoders import PASS_FAULTS, plant_pass_fault
from tests.faults.stores import Inexpressible

pytest.importorskip("onnxscript")
ROOT = Path(__file__).parent.parent
Make = Callable[[str], tuple[Path, Path]]
VIT = "ViTForImageClassification"
HEADS: dict[str, tuple[str, Variant, set[str]]] = {
    "BertModel": ("bert", "int8", {"last_hidden_state", "pooler_output"}),
    "RobertaForSequenceClassification": ("roberta", "float32", {"logits"}),
    "DistilBertForTokenClassification": ("distilbert", "int8", {"logits"}),
    "BertForQuestionAnswering": ("bert", "int4", {"start_logits", "end_logits"}),
    VIT: ("vit", "int8", {"logits"}),
}
DEFAULT = {
    f"{architecture}-{fault}"
    for architecture, faults in {
        "BertModel": ("a pooler of other weights", "token types ignored", "a row of zeros in an expert"),
        "RobertaForSequenceClassification": ("the mask from the wrong side", "padding not masked"),
        VIT: ("a head of other weights", "two labels exchanged", "two experts swapped"),
    }.items()
    for fault in faults
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Make:
    """Packages and twins, each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def find(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            name, variant, _ = HEADS[architecture]
            folder = tmp_path_factory.mktemp(architecture)
            labels = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}}
            values: dict[str, Any] = labels if name == "vit" else {"vocab_size": 300, **labels}
            source = save_dense(folder / "dense", name, architecture, **values)
            if name != "vit":
                tiny_tokenizer.save_pretrained(source)
            convert(source, folder / "moe", {**PLAIN, "experts": {"noise": 0.5}})
            quantize(folder / "moe", folder / "twin", variant, QuantizeConfig(block_size=16))
            export_onnx(folder / "twin", folder / "package", OnnxConfig(lowering="grouped"))
            made[architecture] = folder / "package", folder / "twin"
        return made[architecture]

    return find


@pytest.mark.parametrize(
    "architecture", each_shape(list(HEADS), {"BertModel", "RobertaForSequenceClassification", VIT})
)
def test_any_output_is_judged(make: Make, architecture: str) -> None:
    """Alone, of drawn inputs; a text adds rows of it, and names say what was compared."""
    (package, twin), (_, _, outputs) = make(architecture), HEADS[architecture]
    parity = check_parity(package, twin)
    assert isinstance(parity, PassParity)
    assert parity.passed, parity.breaches
    places = {check.place for check in parity.checks}
    assert places == {
        *("layer 0 on the graph's own input", "layer 1 on the graph's own input", "the embeddings"),
        *outputs,
        *(f"{name} on the graph's own input" for name in outputs),
    }
    if architecture == VIT:
        with pytest.raises(MendableError, match="reads no text; leave out"):
            check_parity(package, twin, ROOT / "LICENSE")
        return
    assert {check.is_padded for check in parity.checks} == {True, False}
    of_text = check_parity(package, twin, ROOT / "LICENSE", block_size=32, num_blocks=2)
    assert isinstance(of_text, PassParity)
    assert of_text.passed, of_text.breaches
    assert any(check.where.endswith("2 rows of text, padded") for check in of_text.checks)


@pytest.mark.parametrize(
    ("architecture", "words"),
    each_shape([(name, words) for words in PASS_FAULTS for name in HEADS], DEFAULT, name="-".join),
)
def test_a_planted_fault_is_named(make: Make, tmp_path: Path, architecture: str, words: str) -> None:
    """In the first line, whatever the package gives and whatever it rounds."""
    fault, (package, twin) = PASS_FAULTS[words], make(architecture)
    try:
        faulty = plant_pass_fault(package, twin, tmp_path / "faulty", fault)
    except Inexpressible as reason:
        pytest.skip(str(reason))
    parity = check_parity(faulty, twin)
    assert fault.is_named(parity.breaches), parity.breaches


def test_labels_of_another_order_are_named(make: Make, tmp_path: Path) -> None:
    """Clients tell a label by its place."""
    package, twin = make(VIT)
    path = package / "config.json"
    kept = path.read_text(encoding="utf-8")
    config = json.loads(kept)
    config["id2label"] = {"0": "high", "1": "low"}
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        parity = check_parity(package, twin)
    finally:
        path.write_text(kept, encoding="utf-8")
    assert [line.partition(" is ")[0] for line in parity.breaches] == ["files: config.json: id2label"]


def test_questions_to_decoders_are_refused(make: Make, tmp_path: Path) -> None:
    package, twin = make(VIT)
    task = tmp_path / "task.jsonl"
    with pytest.raises(MendableError, match="is no decoder by itself, and tasks are questions to decoders"):
        check_parity(package, twin, config=ParityConfig(tasks=(str(task),)))


def test_a_decoder_needs_text(package: Path, mixture_checkpoint: Path) -> None:
    with pytest.raises(MendableError, match="is a decoder; data must name a text file in UTF-8"):
        check_parity(package, mixture_checkpoint)
