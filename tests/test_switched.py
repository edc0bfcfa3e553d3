"""The switched lowering.

A decode step by the fused operator, a prefill by grouped products, and what reads its branches.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from packaging.version import Version

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.export.errors import ExportError
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.footprint import estimate_bytes
from dense2moe.export.graph.branches import take_branches
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.invariants import check_graphs
from dense2moe.export.lowering_plan import plan_lowerings
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.precision import find_precision
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.verdicts import find_breaches
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.storage import DATA_NAME, MODEL_NAME
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from tests.conftest import MakeDense

BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CONFIG = ParityConfig(max_perplexity_increase={}, longest_row=48, free_tokens=4, max_kl=0.1, min_routing_agreement=0.8)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose widths blocks of 16 divide. Shared: read only."""
    output = tmp_path_factory.mktemp("source")
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=1.0)
    )
    upcycle(make_dense(), output, config, 0, silent)
    return output


def export(
    source: Path, folder: Path, variant: Variant, activation_bits: int = 8, lowering: str = "switched"
) -> OnnxFacts:
    for name in ("twin", "package"):
        (folder / name).mkdir(parents=True)
    quantize_checkpoint(source, folder / "twin", variant, QuantizeConfig(method="round", block_size=16), silent)
    return write_package(
        folder / "twin", folder / "package", OnnxConfig(lowering=lowering, activation_bits=activation_bits), silent
    )


@pytest.fixture(scope="module")
def exact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In int4 with exact activations: a folder with `twin` and `package`. Shared: read only."""
    folder = tmp_path_factory.mktemp("exact")
    export(source, folder, "int4", activation_bits=32)
    return folder


def judge(folder: Path, package: Path, source: Path) -> ProviderParity:
    result = check_parity(
        ParitySubject(package, folder / "twin", source, BLOCKS, "int4", False), CONFIG, silent
    ).providers[CPU]
    assert isinstance(result, ProviderParity)
    return result


def ops(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_the_branches_are_the_operator_and_the_products(exact: Path) -> None:
    model = onnx.load(exact / "package" / MODEL_NAME, load_external_data=False)
    assert sum(node.op_type == "If" for node in model.graph.node) == 2
    assert not {"QMoE", "TopK"} & ops(model)
    step, prefill = take_branches(model)
    assert {"QMoE", "If", "TopK"} & ops(step) == {"QMoE"}
    assert {"QMoE", "If", "TopK"} & ops(prefill) == {"TopK"}
    for branch in (step, prefill):
        names = [name for node in branch.graph.node for name in (node.name, *node.output) if name]
        assert len(set(names)) == len(names)
    assert take_branches(step) == [step]


@pytest.mark.parametrize("size", [1, 4, 5, 24])
def test_either_branch_computes_the_same(exact: Path, source: Path, tmp_path: Path, size: int) -> None:
    """A prefill of a few tokens goes by the operator, a longer one by the products."""
    shutil.copytree(exact / "twin", tmp_path / "twin")
    (tmp_path / "package").mkdir()
    write_package(tmp_path / "twin", tmp_path / "package", OnnxConfig(lowering="unrolled", activation_bits=32), silent)
    found, expected = (Decoder(folder / "package") for folder in (exact, tmp_path))
    for decoder_batch in (1, 3):
        ids = BLOCKS[:decoder_batch, :size].numpy()
        ours, theirs = (decoder.run(decoder.new_cache(*ids.shape), ids)["logits"] for decoder in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())


def test_the_whole_package_is_its_twin(exact: Path, source: Path) -> None:
    result = judge(exact, exact / "package", source)
    assert find_breaches(result) == []
    assert set(result.tiers.values()) == {"passed", "not run: no task was given"}
    assert result.num_fallback_nodes == 0


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_with_rounded_activations_it_is_near_its_twin(source: Path, tmp_path: Path, variant: Variant) -> None:
    facts = export(source, tmp_path, variant)
    assert facts.lowering == "switched"
    if Version(ort.__version__) < Version(facts.min_onnxruntime):
        pytest.skip(f"QMoE reads activations of 4-bit weights in 8 bits from onnxruntime {facts.min_onnxruntime} on")
    assert find_precision(tmp_path / "package").variant == variant
    assert find_precision(tmp_path / "package").rounds_activations
    result = check_parity(
        ParitySubject(tmp_path / "package", tmp_path / "twin", source, BLOCKS, variant, True), CONFIG, silent
    )
    assert result.passed, result.breaches


def body_of(node: NodeProto, branch: str) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.name == branch)


def scale_weights(package: Path, output: Path, branch: str, ending: str) -> Path:
    """A copy of a package with larger scales in one branch of the second layer."""
    shutil.copytree(package, output)
    model = onnx.load(output / MODEL_NAME)
    node = [node for node in model.graph.node if node.op_type == "If"][1]
    tensor = next(tensor for tensor in body_of(node, branch).initializer if tensor.name.endswith(ending))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.02), tensor.name))
    (output / DATA_NAME).unlink()
    onnx.save(model, output / MODEL_NAME)
    return output


@pytest.mark.parametrize(("branch", "ending"), [("then_branch", "fc2.scales"), ("else_branch", "expert.2.down.scales")])
def test_a_fault_in_one_branch_is_named_by_its_weights(
    exact: Path, source: Path, tmp_path: Path, branch: str, ending: str
) -> None:
    faulty = scale_weights(exact / "package", tmp_path / "faulty", branch, ending)
    tier, line = find_breaches(judge(exact, faulty, source))[0]
    assert tier == "weights"
    assert line.startswith("'layers.1.moe.")
    assert "rows differ from the twin's" in line


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_a_branch_without_integers_is_found_in_the_file(exact: Path, tmp_path: Path, branch: str) -> None:
    check_graphs(exact / "package", Twin(exact / "twin"))
    faulty = tmp_path / "faulty"
    shutil.copytree(exact / "package", faulty)
    model = onnx.load(faulty / MODEL_NAME, load_external_data=False)
    body = body_of(next(node for node in model.graph.node if node.op_type == "If"), branch)
    product = next(node for node in body.node if node.op_type in ("QMoE", "MatMulNBits"))
    product.op_type, product.domain = "Identity", ""
    del product.input[1:], product.attribute[:]
    onnx.save(model, faulty / MODEL_NAME)
    with pytest.raises(ExportError, match="products read matrices of"):
        check_graphs(faulty, Twin(exact / "twin"))


def test_float_experts_are_grouped_and_exact_8_bit_ones_are_refused(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path, "float32").lowering == "grouped"
    checkpoint = open_checkpoint(source)
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    quantize, wish = QuantizeConfig(block_size=32), OnnxConfig(lowering="switched")
    assert plan_lowerings(checkpoint.config, shapes, "int8-qdq", quantize, wish) == ("grouped",)
    assert plan_lowerings(checkpoint.config, shapes, "int4", quantize, wish) == ("switched",)
    with pytest.raises(
        ExportError, match=r"'switched' cannot express .*: with 8-bit weights the operator reads activations in 8 bits"
    ):
        plan_lowerings(checkpoint.config, shapes, "int8", quantize, OnnxConfig(lowering="switched", activation_bits=32))


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_experts_are_twice_in_the_file_as_the_plan_says(
    make_dense: MakeDense, tmp_path: Path, variant: Variant
) -> None:
    upcycled = tmp_path / "upcycled"
    upcycled.mkdir()
    dense = make_dense(hidden_size=128, intermediate_size=384)
    upcycle(dense, upcycled, UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, silent)
    once, twice = (
        export(upcycled, tmp_path / lowering, variant, lowering=lowering).package_bytes
        for lowering in ("grouped", "switched")
    )
    assert 1.7 < twice / once < 2
    checkpoint = open_checkpoint(upcycled)
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    for lowering, size in (("grouped", once), ("switched", twice)):
        estimated, _ = estimate_bytes(
            checkpoint.config, shapes, variant, QuantizeConfig(method="round", block_size=16), lowering=lowering
        )
        assert estimated == pytest.approx(size, rel=0.03)


def test_a_budget_counts_experts_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "source: model\ndata: {source: {kind: python-docs}, block_size: 64}\nvariants: [mixed]\nquantize: {budget: 1 "
        "MB}\n"
        "export: {lowering: switched}\n",
        encoding="utf-8",
    )
    with pytest.raises(
        RecipeError,
        match=r":5: export.lowering: is 'switched', which writes experts twice; quantize.budget, which counts them "
        r"once",
    ):
        load_recipe(recipe)
