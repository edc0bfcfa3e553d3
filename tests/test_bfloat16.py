"""bfloat16: half the file, exact to its twin on the CPU; for CUDA a graph that computes in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen2MoeForCausalLM

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder, is_at_hand
from dense2moe.export.runtime.inspection import NOTHING, Inspection
from dense2moe.export.storage import DATA_NAME, MODEL_NAME

VOCABULARY = 96
IDS = np.random.default_rng(0).integers(2, VOCABULARY, (2, 24))
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXACT = 5e-6  # float32 sums in another order


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_mixture(directory: Path, model_class: Any = MixtralForCausalLM, **fields: Any) -> Path:
    """Random, every expert chosen, with norms and biases that show in the logits."""
    own: dict[str, Any] = (
        {"num_local_experts": 4}
        if model_class is MixtralForCausalLM
        else {"num_experts": 4, "moe_intermediate_size": 48}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**SMALL | own | {"tie_word_embeddings": True} | fields))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return directory


def export(source: Path, folder: Path, **config: Any) -> tuple[Path, Path]:
    """Its twin and its package."""
    twin, package = folder / "twin", folder / "package"
    for path in (twin, package):
        path.mkdir()
    settings = OnnxConfig(**config)
    quantize_checkpoint(source, twin, "bfloat16", QuantizeConfig(), silent, QuantizeInputs(device=settings.device))
    facts = write_package(twin, package, settings, silent)
    if Version(ort.__version__) < Version(facts.min_onnxruntime):
        # in .ci/runtimes
        pytest.skip(f"the package needs onnxruntime {facts.min_onnxruntime}, this is {ort.__version__}")
    return twin, package


def expect(twin: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(IDS)).logits.numpy()
    return found


def run(package: Path, inspection: Inspection = NOTHING) -> np.ndarray:
    """A prefill of twenty tokens, and four decode steps."""
    decoder = Decoder(package, inspection=inspection, num_threads=1)
    cache = decoder.new_cache(*IDS.shape)
    return np.concatenate(
        [decoder.run(cache, ids)["logits"] for ids in np.split(IDS, [20, 21, 22, 23], axis=1)], axis=1
    )


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_twin_is_the_source_rounded_once_but_for_routers_and_norms(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    twin, _ = export(source, tmp_path, lowering="grouped")
    expected, found = load_file(source / "model.safetensors"), load_file(twin / "model.safetensors")
    for name, tensor in expected.items():
        kept = "norm" in name or name.endswith("gate.weight")
        assert torch.equal(found[name], tensor if kept else tensor.to(torch.bfloat16).float()), name


@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_graph_equals_its_twin_to_float32(tmp_path: Path, lowering: str, tied: bool) -> None:
    twin, package = export(make_mixture(tmp_path / "source", tie_word_embeddings=tied), tmp_path, lowering=lowering)
    expected = expect(twin)
    assert difference(run(package), expected) < EXACT
    assert difference(run(package, inspection=Inspection(streams=True)), expected) < EXACT


def test_biases_and_a_shared_expert_are_stored_in_bfloat16_too(tmp_path: Path) -> None:
    fields = {"shared_expert_intermediate_size": 32, "norm_topk_prob": True, "num_experts_per_tok": 4}
    twin, package = export(
        make_mixture(tmp_path / "source", Qwen2MoeForCausalLM, **fields), tmp_path, lowering="grouped"
    )
    kinds = {
        tensor.name: tensor.data_type
        for tensor in onnx.load(package / MODEL_NAME, load_external_data=False).graph.initializer
    }
    biases = {kind for name, kind in kinds.items() if name.endswith(".bias")}
    assert biases == {TensorProto.BFLOAT16}
    assert kinds["layers.0.shared_expert.down.weight"] == TensorProto.BFLOAT16
    assert kinds["layers.0.shared_expert.scale_logit.weight"] == TensorProto.FLOAT  # it gates, as a router does
    assert difference(run(package), expect(twin)) < EXACT


def test_onnxruntime_folds_every_cast_of_a_weight_as_it_loads(tmp_path: Path) -> None:
    """What is left in bfloat16 is the embedding, whose rows are cast when they are read."""
    _, package = export(make_mixture(tmp_path / "source"), tmp_path, lowering="fused")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(package / MODEL_NAME, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    assert narrow == {"embedding.weight"}
    assert [node.op_type for node in graph.node if narrow & set(node.input)] == ["Gather"]
    assert {node.output[0] for node in graph.node if node.op_type == "Cast"} & {
        f"{name}.widened" for name in narrow
    } == set()


def read_as_float32(package: Path, directory: Path) -> Path:
    """A copy of a package with every bfloat16 in the place of which float32 stands.

    The same graph, for a runtime that has no bfloat16 kernels.
    """
    shutil.copytree(package, directory)
    proto = onnx.load(directory / MODEL_NAME)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    (directory / DATA_NAME).unlink()
    onnx.save(proto, directory / MODEL_NAME)
    return directory


@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled"])
def test_for_cuda_the_graph_computes_in_bfloat16_but_for_routers_norms_and_logits(
    tmp_path: Path, lowering: str
) -> None:
    twin, package = export(make_mixture(tmp_path / "source"), tmp_path, lowering=lowering, device="cuda")
    assert Twin(twin).element_type == "bfloat16"
    graph = onnx.load(package / MODEL_NAME, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert [kinds[f"router_logits.{n}.weight"] for n in range(2)] == [TensorProto.FLOAT] * 2
    assert {kinds[node.input[-1]] for node in graph.node if node.op_type.endswith("SimplifiedLayerNormalization")} == {
        TensorProto.FLOAT
    }
    declared = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert {kind for name, kind in declared.items() if name.startswith(("past", "present"))} == {TensorProto.BFLOAT16}
    assert declared["logits"] == TensorProto.FLOAT
    chosen = [node.input[0] for node in graph.node if node.op_type == "TopK" and node.output[0].endswith(".top_k")]
    assert chosen == ["router_logits.0", "router_logits.1"]  # float32, and before the operator where there is one
    products = {
        kinds[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in kinds and "router" not in node.name
    }
    assert products == {TensorProto.BFLOAT16}
    # No provider here computes in bfloat16; read as float32, the graph must compute what its twin does, but for rotary
    # tables rounded to 2^-9.
    assert difference(run(read_as_float32(package, tmp_path / "widened")), expect(twin)) < 0.02


def test_a_package_that_nothing_here_can_run_has_not_passed(tmp_path: Path) -> None:
    if is_at_hand(CUDA):
        pytest.skip("a CUDA device is here to run it")
    source = make_mixture(tmp_path / "source")
    twin, package = export(source, tmp_path, lowering="fused", device="cuda")
    parity = check_parity(
        ParitySubject(package, twin, source, torch.from_numpy(IDS), "bfloat16", True), ParityConfig(), silent
    )
    assert not parity.passed
    reasons = f"{CPU}: not run: onnxruntime's CPU does not compute in bfloat16; {CUDA}: not run: no CUDA device"
    assert parity.breaches == (f"compared nowhere: {reasons}",)


def test_a_weight_beyond_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    source = make_mixture(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name][3, 5] = 3.4e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "twin").mkdir()
    message = f"{source}: tensor '{name}' holds 3.4e+38; bfloat16 reaches 3.38953e+38; leave out 'bfloat16'"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        quantize_checkpoint(source, tmp_path / "twin", "bfloat16", QuantizeConfig(), silent)


@pytest.mark.gpu
@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled"])
def test_a_file_for_cuda_equals_its_twin_within_bfloat16_on_cuda(tmp_path: Path, lowering: str) -> None:
    if not is_at_hand(CUDA):
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    twin, package = export(make_mixture(tmp_path / "source"), tmp_path, lowering=lowering, device="cuda")
    decoder = Decoder(package, CUDA)
    found = decoder.run(decoder.new_cache(*IDS.shape), IDS)["logits"]
    assert difference(found, expect(twin)) < 0.1  # each product rounds by 2^-9; float16, eight times finer, has 6e-3
