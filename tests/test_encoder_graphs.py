"""Nodes of an encoder's graph that are made fast: attention, sums before norms, activations of experts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from host_row import LAYERS
from test_host_onnx import DIFFERENT, run
from test_hosts import convert, ignore, save_dense

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.storage import find_graph
from dense2moe.upcycle.checkpoints.loaded import load_model

pytest.importorskip("onnxscript")


def export(name: str, folder: Path) -> tuple[Path, Path]:
    """A tiny mixture's twin and its package."""
    convert(save_dense(folder / "dense", name), folder / "moe", DIFFERENT)
    twin, package = folder / "twin", folder / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(folder / "moe", twin, "float32", QuantizeConfig(), ignore)
    write_package(twin, package, OnnxConfig(lowering="grouped"), ignore)
    return twin, package


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export("bert", tmp_path_factory.mktemp("bert"))


def read(package: Path) -> onnx.GraphProto:
    return onnx.load(find_graph(package), load_external_data=False).graph


def count_loaded(package: Path, folder: Path) -> Counter[str]:
    """Nodes by operator, as onnxruntime leaves them when it has loaded a graph."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    ort.InferenceSession(find_graph(package), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "loaded.onnx", load_external_data=False).graph.node)


def attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "MultiHeadAttention"]


def test_attention_of_an_encoder_is_one_node_with_a_bias_where_it_has_a_mask(bert: tuple[Path, Path]) -> None:
    found = attentions(read(bert[1]))
    assert len(found) == LAYERS
    assert len({node.input[5] for node in found}) == 1  # one mask serves all layers


def test_images_have_no_mask(tmp_path: Path) -> None:
    found = attentions(read(export("vit", tmp_path)[1]))
    assert len(found) == LAYERS
    assert all(len(node.input) == 3 for node in found)


def test_a_decoder_keeps_the_nodes_of_its_attention(tmp_path: Path) -> None:
    assert not attentions(read(export("gpt2", tmp_path)[1]))


@torch.no_grad()
def test_a_text_of_padding_alone_gives_what_torch_gives(bert: tuple[Path, Path]) -> None:
    """At padded tokens too: the first text has holes, the second is padded on the left, the third is all padding."""
    twin, package = bert
    given = {
        "input_ids": torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 9]),
        "token_type_ids": torch.zeros(3, 9, dtype=torch.int64),
    }
    session = ort.InferenceSession(find_graph(package), providers=["CPUExecutionProvider"])
    model = load_model(twin, torch.float32, "masked_token")
    model.set_attn_implementation("sdpa")
    expected = model(**given).logits
    torch.testing.assert_close(run(session, given)["logits"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_onnxruntime_makes_no_slow_norms_of_sums(bert: tuple[Path, Path], tmp_path: Path) -> None:
    written = Counter(node.op_type for node in read(bert[1]).node)
    assert written["Sum"] == 2 * LAYERS
    assert count_loaded(bert[1], tmp_path)["SkipLayerNormalization"] == 0


def test_what_keeps_sums_is_needed(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """With `Add` onnxruntime still makes them: when it does so no longer, or has a fast kernel, the pass may go."""
    model = onnx.load(find_graph(bert[1]))
    for node in model.graph.node:
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    onnx.save(model, tmp_path / "model.onnx")
    assert count_loaded(tmp_path, tmp_path)["SkipLayerNormalization"] == 2 * LAYERS


def test_experts_without_a_gate_activate_their_own_rows(bert: tuple[Path, Path]) -> None:
    num_experts = 4
    written = [node for node in read(bert[1]).node if node.op_type == "Gelu" and ".expert." in node.name]
    assert len(written) == LAYERS * num_experts
