"""Packages of an encoder and a decoder: files, parity that names a fault, text by the Python API, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import NodeProto
from test_hosts import PLAIN, convert, ignore, save_dense
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dense2moe.api import GenerateConfig, Package, PassParity, check_parity
from dense2moe.convert.cli import main
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.pair import check_pair
from dense2moe.export.parity.place import OUTSIDE
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.loaded import load_model

pytest.importorskip("onnxscript")
DIFFERENT = {**PLAIN, "experts": {"noise": 0.3}}
TASK = "text2text-generation"
TEXTS = ["Licensed under the Apache License", "You may not use this file", "copyright"]
DECODER = "onnx/decoder_model_merged.onnx"


@dataclass(frozen=True)
class Exported:
    """A package and its twin."""

    package: Path
    twin: Path


def export(folder: Path, source: Path, variant: Variant, config: OnnxConfig) -> Exported:
    convert(source, folder / "moe", DIFFERENT)
    found = Exported(folder / "package", folder / "twin")
    for directory in (found.package, found.twin):
        directory.mkdir()
    settings = QuantizeConfig(block_size=16, embedding_bits="variant")
    quantize_checkpoint(folder / "moe", found.twin, variant, settings, ignore)
    write_package(found.twin, found.package, config, ignore)
    return found


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Exported:
    """In 8 bits, with exact inputs of products, so that torch writes the same; its lowering is timed."""
    folder = tmp_path_factory.mktemp("bart")
    source = save_dense(folder / "dense", "bart", vocab_size=301, decoder_layers=1, init_std=0.3, forced_bos_token_id=7)
    tiny_tokenizer.save_pretrained(source)
    return export(folder, source, "int8", OnnxConfig(activation_bits=32))


def test_files_and_names_are_optimums(bart: Exported) -> None:
    """And the config names the dense family, which clients know."""
    assert sorted(path.name for path in (bart.package / "onnx").iterdir()) == [
        *("decoder_model_merged.onnx", "decoder_model_merged.onnx_data"),
        *("encoder_model.onnx", "encoder_model.onnx_data"),
    ]
    encoder = onnx.load(bart.package / "onnx/encoder_model.onnx", load_external_data=False).graph
    decoder = onnx.load(bart.package / DECODER, load_external_data=False).graph
    states = [f"0.{side}.{kind}" for side in ("decoder", "encoder") for kind in ("key", "value")]
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    assert [value.name for value in decoder.input] == [
        *("input_ids", "encoder_attention_mask", "encoder_hidden_states"),
        *(f"past_key_values.{state}" for state in states),
        "use_cache_branch",
    ]
    assert [value.name for value in decoder.output] == ["logits", *(f"present.{state}" for state in states)]
    config = json.loads((bart.package / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bart", ["BartForConditionalGeneration"])
    assert config["mixture"]["num_experts"] == 4


def test_weights_are_in_a_file_once(bart: Exported) -> None:
    """Branches share all but the products that make keys and values; a tied head has the embedding's integers."""
    decoder = onnx.load(bart.package / DECODER, load_external_data=False)
    (node,) = (node for node in decoder.graph.node if node.op_type == "If")
    cached, encoded = (next(a.g for a in node.attribute if a.name == f"{name}_branch") for name in ("then", "else"))
    products = [each.op_type for each in encoded.node if each.op_type == "MatMulNBits"]
    assert len(products) == 2
    assert all(len(tensor.dims) < 2 for tensor in cached.initializer)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}["offset"]
        for tensor in decoder.graph.initializer
        if tensor.name in ("embedding.codes", "lm_head.codes")
    ]
    assert len(places) == 2
    assert len(set(places)) == 1


def test_parity_passes_in_every_tier(bart: Exported) -> None:
    parity = check_parity(bart.package, bart.twin)
    assert isinstance(parity, PassParity)
    assert parity.passed, parity.breaches
    assert {check.tier for check in parity.checks} == {"layer", "outputs", "steps", "answers", "rows"}
    assert {check.layer for check in parity.checks if check.tier == "layer"} == {OUTSIDE, 0, 1, 2}
    assert parity.weights.num_rows > 1000


def plant(package: Path, target: Path, change: Callable[[onnx.GraphProto], None], file: str = DECODER) -> Path:
    shutil.copytree(package, target)
    model = onnx.load(package / file, load_external_data=False)
    change(model.graph)
    onnx.save(model, target / file)
    return target


def change_last_epsilon(graph: onnx.GraphProto) -> None:
    norm = [node for node in graph.node if node.op_type == "LayerNormalization"][-1]
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-2


def sharpen_cached_attention(graph: onnx.GraphProto) -> None:
    """Of steps alone: scores of the attention to the encoder are doubled where the cache is read."""
    (node,) = (node for node in graph.node if node.op_type == "If")
    branch = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
    place, softmax = next((n, each) for n, each in enumerate(branch.node) if each.op_type == "Softmax")
    scores = softmax.input[0]
    softmax.input[0] = "doubled"
    branch.node.insert(place, NodeProto(op_type="Add", input=[scores, scores], output=["doubled"], name="doubled"))


@pytest.mark.parametrize(
    ("change", "file", "tiers", "layers"),
    [
        (change_last_epsilon, DECODER, {"layer"}, {2}),
        (change_last_epsilon, "onnx/encoder_model.onnx", {"layer"}, {1}),
        (sharpen_cached_attention, DECODER, {"steps", "answers"}, {None}),
    ],
    ids=["decoder", "encoder", "steps"],
)
def test_a_fault_is_named_where_it_is(
    bart: Exported, tmp_path: Path, change: Any, file: str, tiers: set[str], layers: set[int | None]
) -> None:
    """The epsilon of a layer's last norm in its layer; what steps alone compute in the steps."""
    parity = check_pair(plant(bart.package, tmp_path / "broken", change, file), bart.twin)
    wrong = [check for check in parity.checks if not check.is_right]
    assert {check.layer for check in wrong if check.tier in tiers} == layers
    if None not in layers:
        assert {check.layer for check in wrong if check.tier == "layer"} == layers
    else:
        assert {check.tier for check in wrong} <= tiers


def test_the_commands_read_a_text_and_write_another(bart: Exported, tmp_path: Path) -> None:
    judged = CliRunner().invoke(main, ["parity", str(bart.package), "--reference", str(bart.twin)])
    assert judged.exit_code == 0, judged.output
    assert "steps: 3 compared" in judged.output
    arguments = ["generate", str(bart.package), "--prompt", TEXTS[0], "--max-new-tokens", "6"]
    written = CliRunner().invoke(main, arguments)
    assert written.exit_code == 0, written.output
    assert not written.stdout.startswith(TEXTS[0])
    timed = CliRunner().invoke(main, ["bench", str(bart.package)])
    assert timed.exit_code == 1
    assert "an encoder and a decoder" in timed.output


def test_the_api_writes_what_transformers_writes(bart: Exported) -> None:
    """Of texts alone and together, greedily, and the forced first token too."""
    tokenizer = AutoTokenizer.from_pretrained(bart.twin)
    package = Package(bart.package)
    written = package.generate(TEXTS, GenerateConfig(max_new_tokens=8, temperature=0))
    assert [package.generate(text, GenerateConfig(max_new_tokens=8, temperature=0)) for text in TEXTS] == written
    model = load_model(bart.twin, torch.float32, TASK)
    for text, own in zip(TEXTS, written, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False, num_beams=1)
        expected = tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
        assert own == expected
    assert len(set(written)) > 1
    assert not package.continues


def test_what_is_no_pair_is_refused_in_one_line(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written: LED, whose windows no trace follows, and a class with labels."""
    for name, architecture, said in (
        ("led", None, "cannot be traced"),
        ("bart", "BartForSequenceClassification", "writes no text"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        convert(save_dense(folder / "dense", name, architecture), folder / "moe", PLAIN)
        for directory in (folder / "twin", folder / "package"):
            directory.mkdir()
        quantize_checkpoint(folder / "moe", folder / "twin", "float32", QuantizeConfig(), ignore)
        capfd.readouterr()
        with pytest.raises(ExportError, match=said) as refusal:
            write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped"), ignore)
        assert "\n" not in str(refusal.value)
        assert capfd.readouterr() == ("", "")
        assert not list((folder / "package").iterdir())
