"""Every family that upcycling makes is exported, and a dense model too.

The package computes the logits of transformers, however it is fed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import EXPORTED, Exported
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.export.coverage import DECODERS
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle

PREFILL, STEPS = 20, 64
# Float32 sums in another order, through four layers: 3e-6 measured at most over the tests of this file.
EXACT = 1e-5
FLOAT16 = 1e-2  # each product rounds what it reads and writes by 2^-11 of itself: 5.4e-3 measured at most

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0

MakeDense = Callable[..., Path]


def move_biases(mixture: Path) -> None:
    """Give a mixture selection biases, where its gates have them, that choose other experts than the scores do."""
    state = load_file(mixture / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.6 - 0.3)
    save_file(state, mixture / "model.safetensors", metadata={"format": "pt"})


class Export:
    """A tiny mixture, upcycled with noise so that its experts differ, exported.

    Its twin in torch, and its package in onnxruntime.
    """

    def __init__(self, dense: Path, directory: Path, case: Exported, variant: Variant, config: OnnxConfig) -> None:
        mixture, twin, package = (directory / name for name in ("mixture", "twin", "package"))
        for path in (mixture, twin, package):
            path.mkdir()
        if case.upcycle is not None:
            settings = UpcycleConfig(num_experts=4, experts=ExpertsConfig(noise=0.5), **case.upcycle)
            upcycle(dense, mixture, settings, 0, lambda *_: None)
            move_biases(mixture)
        self.quantized = quantize_checkpoint(
            dense if case.upcycle is None else mixture,
            twin,
            variant,
            QuantizeConfig(method="search", block_size=16),
            lambda *_: None,
        )
        self.facts = write_package(twin, package, config, lambda *_: None)
        self.package = package
        self.decoder = Decoder(package, num_threads=1)
        experts = {} if case.upcycle is None else {"experts_implementation": "eager"}
        self.torch = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, **experts).eval()

    def error(self, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> float:
        """Largest difference at real tokens, relative to the largest logit.

        Between the package fed in pieces and one forward of transformers.
        """
        cache = self.decoder.new_cache(*ids.shape)
        ends = np.cumsum(pieces)
        found = np.concatenate(
            [
                self.decoder.run(cache, ids[:, end - n : end], mask[:, end - n : end])["logits"]
                for n, end in zip(pieces, ends, strict=True)
            ],
            axis=1,
        )
        mask_BT = torch.from_numpy(mask)
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            expected = self.torch(
                torch.from_numpy(ids), attention_mask=mask_BT, position_ids=positions, use_cache=False
            ).logits.numpy()
        real = mask.astype(bool)
        return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())


def draw(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a prompt and the tokens after it.

    The first row of three lacks 12 tokens on the left, the second 6.
    """
    ids = np.random.default_rng(0).integers(2, 300, (batch, PREFILL + STEPS))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, : 6 * (batch - 1 - row)] = 0
    return ids, mask


def assert_same_logits(export: Export, limit: float = EXACT) -> None:
    """Prefill and 64 chained decode steps, one row and three with padding."""
    for batch in (1, 3):
        ids, mask = draw(batch)
        assert export.error(ids[:, :PREFILL], mask[:, :PREFILL], [PREFILL]) < limit, (batch, "prefill")
        assert export.error(ids, mask, [PREFILL] + [1] * STEPS) < limit, (batch, "decode")


@pytest.mark.parametrize("name", EXPORTED)
def test_a_float32_package_equals_transformers(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    case = EXPORTED[name]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        "float32",
        OnnxConfig(lowering="grouped"),
    )
    assert export.torch.config.model_type == case.target
    assert_same_logits(export)


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "llama, half shared",
        "qwen2, biases",
        "qwen3, q and k norms, some layers",
        "granite, shared",
        "olmo2, norms after",
        "llama, dense",
    ],
)
def test_a_quantized_package_equals_its_twin(
    name: str, variant: Variant, make_dense: MakeDense, tmp_path: Path
) -> None:
    case = EXPORTED[name]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        variant,
        OnnxConfig(activation_bits=32, lowering="grouped"),
    )
    assert export.quantized.quantized_expert_share == 1.0
    assert_same_logits(export)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_float16_package_equals_its_twin_within_float16(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """With every expert chosen, so that no rounding changes which."""
    case = EXPORTED[name]
    if case.upcycle is not None:
        case = replace(case, upcycle=case.upcycle | {"num_experts_per_tok": 4})
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        "float16",
        OnnxConfig(lowering="grouped"),
    )
    assert export.facts.element_type == "float16"
    assert_same_logits(export, FLOAT16)


def test_every_family_has_a_case() -> None:
    assert {case.target for case in EXPORTED.values()} | {"mixtral"} == {family.model_type for family in DECODERS}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mistral, window", "sliding_window", None),
        ("qwen2, windows by layer", "layer_types", ["full_attention"] * 4),
        ("qwen3, biases and window", "sliding_window", None),
        ("granite, multipliers", "residual_multiplier", 1.0),
        ("granite, multipliers", "attention_multiplier", 1.0),
        ("granite, multipliers", "embedding_multiplier", 1.0),
        ("granite, multipliers", "logits_scaling", 1.0),
        ("gemma, tanh GELU", "hidden_act", "silu"),
    ],
)
def test_what_a_case_is_about_shows_in_its_logits(
    name: str, field: str, value: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Else the equality above would say nothing: with the field changed in the torch model, the two differ by far."""
    case = EXPORTED[name]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        "float32",
        OnnxConfig(lowering="grouped"),
    )
    config = export.torch.config
    setattr(config, field, value)
    changed = type(export.torch)(config).eval()
    changed.load_state_dict(export.torch.state_dict())
    changed.set_experts_implementation("eager")
    export.torch = changed
    ids, mask = draw(1)
    assert export.error(ids, mask, [PREFILL] + [1] * STEPS) > 100 * EXACT


def test_a_layer_without_experts_has_no_router_and_a_shared_expert_of_width_0_no_node(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    case = EXPORTED["llama, some layers"]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        "float32",
        OnnxConfig(lowering="grouped"),
    )
    outputs = {
        name
        for node in onnx.load(export.package / MODEL_NAME, load_external_data=False).graph.node
        for name in node.output
    }
    assert {name for name in outputs if name.startswith("router_logits.")} == {"router_logits.1", "router_logits.3"}
    assert not any("shared_expert" in name for name in outputs)
    assert {name for name in outputs if name.endswith(".ffn.down")} == {"layers.0.ffn.down", "layers.2.ffn.down"}


def test_a_gate_other_than_silu_has_no_fused_operator(make_dense: MakeDense, tmp_path: Path) -> None:
    case = EXPORTED["gemma, tanh GELU"]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides), tmp_path, case, "float32", OnnxConfig()
    )
    assert {time.lowering for time in export.facts.timings} == {"grouped", "unrolled"}


def test_a_dense_model_has_no_lowering_whatever_is_asked_for(make_dense: MakeDense, tmp_path: Path) -> None:
    case = EXPORTED["llama, dense"]
    export = Export(
        make_dense(architecture=case.architecture, **case.overrides),
        tmp_path,
        case,
        "float32",
        OnnxConfig(lowering="fused"),
    )
    assert (export.facts.lowering, export.facts.timings) == ("none", ())
    assert not any(
        node.op_type in ("MoE", "QMoE")
        for node in onnx.load(export.package / MODEL_NAME, load_external_data=False).graph.node
    )
