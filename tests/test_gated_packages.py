"""GLM-4-MoE by the fused operators, which know no sigmoid: packages compute their twins, and parity says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.export.graph.branches import take_branches
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.invariants import check_graphs
from dense2moe.export.lowering import LoweringWish
from dense2moe.export.package import OnnxFacts, write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from tests.conftest import MakeDense

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0

BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CONFIG = ParityConfig(max_perplexity_increase={}, longest_row=48, free_tokens=4, max_kl=0.1, min_routing_agreement=0.8)
EXACT = 5e-6  # float32 sums in another order, through two layers: 1.2e-6 measured
PREFILL, STEPS = 20, 8


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Weights:
    """What a GLM-4-MoE config says of its weights."""

    norm_topk_prob: bool
    routed_scaling_factor: float


PLAIN, GLM = Weights(True, 1.0), Weights(False, 2.5)


def make_source(make_dense: MakeDense, output: Path, weights: Weights) -> Path:
    """A mixture whose selection biases choose other experts than its scores would."""
    settings = UpcycleConfig(
        target="glm4_moe",
        num_experts=4,
        num_experts_per_tok=2,
        experts=ExpertsConfig(noise=0.5),
        router=RouterConfig(logit_std=1.0),
    )
    upcycle(make_dense(), output, settings, 0, silent)
    state = load_file(output / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.6 - 0.3)
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config |= {"norm_topk_prob": weights.norm_topk_prob, "routed_scaling_factor": weights.routed_scaling_factor}
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.fixture(scope="module")
def sources(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> dict[Weights, Path]:
    """Shared: read only."""
    return {each: make_source(make_dense, tmp_path_factory.mktemp("source"), each) for each in (PLAIN, GLM)}


def export(source: Path, folder: Path, variant: Variant, lowering: LoweringWish, activation_bits: int = 8) -> OnnxFacts:
    for name in ("twin", "package"):
        (folder / name).mkdir(parents=True)
    quantize_checkpoint(source, folder / "twin", variant, QuantizeConfig(method="round", block_size=16), silent)
    config = OnnxConfig(lowering=lowering, activation_bits=activation_bits)
    facts = write_package(folder / "twin", folder / "package", config, silent)
    if Version(ort.__version__) < Version(facts.min_onnxruntime):
        pytest.skip(f"this package needs onnxruntime {facts.min_onnxruntime}")
    return facts


def operators(package: Path) -> set[str]:
    model = onnx.load(package / MODEL_NAME, load_external_data=False)
    return {node.op_type for branch in take_branches(model) for node in branch.graph.node}


def error(folder: Path) -> float:
    """Largest difference from transformers, over a prefill and single steps, relative to the largest logit."""
    ids = BLOCKS[:2, : PREFILL + STEPS]
    decoder = Decoder(folder / "package", num_threads=1)
    cache = decoder.new_cache(*ids.shape)
    parts = [ids[:, :PREFILL], *ids[:, PREFILL:].split(1, dim=1)]
    found = np.concatenate([decoder.run(cache, part.numpy())["logits"] for part in parts], axis=1)
    model = AutoModelForCausalLM.from_pretrained(folder / "twin", dtype=torch.float32, experts_implementation="eager")
    with torch.inference_mode():
        expected = model.eval()(ids).logits.numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("weights", [PLAIN, GLM], ids=str)
@pytest.mark.parametrize(
    ("variant", "lowering", "operator"),
    [("float32", "fused", "MoE"), ("int4", "fused", "QMoE"), ("int4", "switched", "QMoE")],
)
def test_a_package_computes_its_twin(
    weights: Weights,
    variant: Variant,
    lowering: LoweringWish,
    operator: str,
    sources: dict[Weights, Path],
    tmp_path: Path,
) -> None:
    """With exact activations, so that it is known to float32's rounding."""
    facts = export(sources[weights], tmp_path, variant, lowering, activation_bits=32)
    assert facts.lowering == ("switched" if lowering == "switched" else operator.lower())
    assert operator in operators(tmp_path / "package")
    check_graphs(tmp_path / "package", Twin(tmp_path / "twin"))
    assert error(tmp_path) < EXACT


@pytest.mark.parametrize(
    ("variant", "lowering"), [("int8", "fused"), ("int4", "fused"), ("int8", "switched"), ("float16", "fused")]
)
def test_parity_passes_where_activations_or_floats_are_rounded(
    variant: Variant, lowering: LoweringWish, sources: dict[Weights, Path], tmp_path: Path
) -> None:
    facts = export(sources[GLM], tmp_path, variant, lowering)
    assert facts.lowering in ("moe", "qmoe", "switched")
    subject = ParitySubject(tmp_path / "package", tmp_path / "twin", sources[GLM], BLOCKS, variant, True)
    result = check_parity(subject, CONFIG, silent)
    assert result.passed, result.breaches


def test_auto_times_the_operator_too(sources: dict[Weights, Path], tmp_path: Path) -> None:
    facts = export(sources[PLAIN], tmp_path, "float32", "auto")
    assert {time.lowering for time in facts.timings} == {"moe", "grouped", "unrolled"}
